"""What clients see: readiness, traffic, latency, errors, answers; the dashboard to begin with."""

from __future__ import annotations

from deploy.dashboards import PUBLIC_MODEL, Dashboard, Panel, Query, Row
from deploy.dashboards_answers import CONFIDENCE, PREDICTIONS

_GATEWAY = 'clotline_gateway_requests_total{server=~"$server",route="infer"}'
_DURATION = 'clotline_gateway_request_duration_seconds_bucket{server=~"$server",route="infer"}'
_SUMMARY = 'nv_inference_request_summary_us{server=~"$server",model=~"$model",release="",quantile="%s"}'


def _gateway_quantile(share: float) -> Query:
    expr = (
        f"histogram_quantile({share}, sum by (protocol, le) (rate({_DURATION[:-1]}" + "}[$__rate_interval])))"
    )
    return Query(expr, f"p{share * 100:.0f} {{{{protocol}}}}")


def _model_quantile(share: float) -> Query:
    return Query(f"max by (model) ({_SUMMARY % share}) / 1e6", f"p{share * 100:.0f} {{{{model}}}}")


NOW = Row(
    "Now",
    (
        Panel("Ready", "1 while every public model has been proven lately and no stub is missing.", "none",
              (Query('min by (server) (clotline_ready{server=~"$server"})', "{{server}}"),), "number", width=4),
        Panel("Alerts", "How many alerts are firing.", "none",
              (Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"),), "number", width=4),
        Panel("Requests", "Inference requests that the gateway answered or refused.", "reqps",
              (Query('sum(clotline:gateway_requests:rate5m{server=~"$server"})', "all"),), "number", width=4),
        Panel("Errors", "Share of them that failed through no fault of the client (5 minutes).", "percentunit",
              (Query('max(clotline:gateway_error_ratio:5m{server=~"$server"})', "all"),), "number", width=4),
        Panel("Slowest of twenty", "p95 at the gateway (5 minutes).", "s",
              (Query('max by (protocol) (clotline:gateway_latency_p95_seconds:5m{server=~"$server"} >= 0)', "{{protocol}}"),),
              "number", width=4),
        Panel("Release", "Number of the release that answers; 1 on a server without releases.", "none",
              (Query('max by (model, number) (clotline_release_info{server=~"$server",model=~"$model"})',
                     "{{model}}: {{number}}"),), "number", width=4),
    ),
)  # fmt: skip

TRAFFIC = Row(
    "Traffic and latency",
    (
        Panel("Request rate", "Inference requests at the gateway, refused ones too.", "reqps",
              (Query(f"sum by (protocol) (rate({_GATEWAY}[$__rate_interval]))", "{{protocol}}"),)),
        Panel("Latency", "Accepted requests at the gateway, from their first byte to the last of the answer; tiles and slides "
              "together.", "s", (_gateway_quantile(0.5), _gateway_quantile(0.95), _gateway_quantile(0.99))),
        Panel("Active requests", "Mean number at work or waiting in Triton. Inner models are parts of public ones.", "none",
              (Query('sum by (model) (clotline:model_in_flight:5m{server=~"$server",model=~"$model",release=""})',
                     "{{model}}"),)),
        Panel("Request rate by model", "Answered by Triton. The supervisor's own questions count (one every 2 s to an idle "
              "model), and so do those that slide_classifier asks of tile_classifier.", "reqps",
              (Query('sum by (model) (rate(nv_inference_request_success{server=~"$server",model=~"$model",release=""}'
                     "[$__rate_interval]))", "{{model}}"),)),
        Panel("Latency by model", "In Triton, within the last minute; without the gateway and the network.", "s",
              (_model_quantile(0.5), _model_quantile(0.95), _model_quantile(0.99))),
        Panel("Model status", "Whether a public model has been proven lately.", "none",
              (Query('min by (model) (clotline_model_ready{server=~"$server",model=~"$model"})', "{{model}}"),), "states"),
    ),
)  # fmt: skip

ERRORS = Row(
    "Errors",
    (
        Panel("Error rate", "Share of requests that failed through no fault of the client: at the gateway, and in the models.",
              "percentunit",
              (Query('clotline:gateway_error_ratio:5m{server=~"$server"}', "gateway"),
               Query('max by (model) (clotline:model_fault_ratio:5m{server=~"$server"})', "{{model}}"))),
        Panel("Errors by type", "What the gateway answered instead of 200, why inputs were refused, and what failed in Triton (an "
              "ensemble's failures are left out: Triton counts each twice).", "reqps",
              (Query('sum by (status) (rate(clotline_gateway_requests_total{server=~"$server",route="infer",status!~"2.."}'
                     "[$__rate_interval]))", "HTTP {{status}}"),
               Query('sum by (reason) (rate(clotline_rejected_inputs_total{server=~"$server"}[$__rate_interval]))',
                     "{{reason}}"),
               Query('sum by (reason) (rate(nv_inference_request_failure{server=~"$server",reason!="OTHER"}'
                     "[$__rate_interval]))", "Triton: {{reason}}"))),
        Panel("Error budget", "Share of failed requests over the windows of the burn-rate alerts; the objective is 0.1 %.",
              "percentunit",
              tuple(Query(f'max(clotline:gateway_error_ratio:{window}{{server=~"$server"}})', window)
                    for window in ("5m", "30m", "1h", "6h", "3d"))),
    ),
)  # fmt: skip

ANSWERED = Row(
    "Answers",
    (
        PREDICTIONS,
        CONFIDENCE,
        Panel("Batch sizes", "Tiles in one execution of a model, on average.", "none",
              (Query('max by (model) (clotline:model_batch_size:5m{server=~"$server"})', "{{model}}"),)),
    ),
)  # fmt: skip

GATEWAY = Row(
    "Gateway",
    (
        Panel("Requests by key", "Who asks; `none` came without a valid key.", "reqps",
              (Query('sum by (key) (rate(clotline_gateway_requests_total{server=~"$server"}[$__rate_interval]))',
                     "{{key}}"),), "stacked"),
        Panel("Bytes by key", "Of requests.", "Bps",
              (Query('sum by (key) (rate(clotline_gateway_request_bytes_total{server=~"$server"}[$__rate_interval]))',
                     "{{key}}"),), "stacked"),
        Panel("Turned away", "401: no valid key; 413: too large; 429: over the key's limit; 503: too many in flight, or not ready.",
              "reqps",
              (Query('sum by (status) (rate(clotline_gateway_requests_total{server=~"$server",status=~"401|403|413|429|503"}'
                     "[$__rate_interval]))", "{{status}}"),)),
        Panel("Requests by track", "Who answers: the server (stable), a candidate for its succession (canary), or the server because the "
              "candidate failed (canary_fallback).", "reqps",
              (Query(f"sum by (track) (rate({_GATEWAY}[$__rate_interval]))", "{{track}}"),), "stacked"),
        Panel("Latency by track", "p95 of accepted requests.", "s",
              (Query(f"histogram_quantile(0.95, sum by (track, le) (rate({_DURATION}[$__rate_interval])))", "{{track}}"),)),
        Panel("Certificates", "Days until they expire.", "d",
              (Query('(clotline_certificate_expiry_timestamp_seconds{server=~"$server"} - time()) / 86400',
                     "{{certificate}}"),), "number", width=24),
    ),
)  # fmt: skip

SERVICE = Dashboard(
    uid="clotline-service",
    title="Clotline: service",
    about="What clients see. Alerts and their thresholds: docs/monitoring.md.",
    rows=(NOW, TRAFFIC, ERRORS, ANSWERED, GATEWAY),
    model=PUBLIC_MODEL,
)
