#!/bin/sh
# For /docker-entrypoint.d/ of the nginx image: nginx reads keys and certificate again when they have changed.
# The directories have to be mounted, not the files: `python -m deploy keys` and `certificate` put new files in place.
set -eu
conf="${CLOTLINE_CONF:-/etc/nginx/nginx.conf}"

seen() {
    cksum "$CLOTLINE_KEYS" "$CLOTLINE_CERTIFICATE" "$CLOTLINE_CERTIFICATE_KEY" "$CLOTLINE_CLIENT_CA" 2>/dev/null || true
}

watch() {
    before="$(seen)"
    while sleep "${CLOTLINE_LOOK_S:-5}"; do
        now="$(seen)"
        if [ "$now" != "$before" ]; then
            before="$now"
            # A file that nginx does not take leaves the old one in force; its error log says why.
            if nginx -t -q -c "$conf"; then nginx -s reload -c "$conf"; fi
        fi
    done
}

watch &
