"""What the models answer, to which inputs, and how far both are from what the release was judged on."""

from __future__ import annotations

from deploy.dashboards import PUBLIC_MODEL, Dashboard, Panel, Query, Row

_OF_MODEL = '{server=~"$server",model=~"$model"}'
_OF_SERVER = '{server=~"$server"}'


def _histogram_quantile(share: float, metric: str, selector: str) -> Query:
    expr = (
        f"histogram_quantile({share}, sum by (model, le) (rate({metric}_bucket{selector}[$__rate_interval])))"
    )
    return Query(expr, f"p{share * 100:.0f} {{{{model}}}}")


PREDICTIONS = Panel(
    "Predictions by class",
    "Answers a second, by the class with the highest probability.",
    "ops",
    (
        Query(
            f"sum by (model, class) (rate(clotline_predictions_total{_OF_MODEL}[$__rate_interval]))",
            "{{model}} {{class}}",
        ),
    ),
    "stacked",
)
CONFIDENCE = Panel(
    "Confidence",
    "How often the predicted class had which probability.",
    "none",
    (
        Query(
            f"sum by (le) (increase(clotline_prediction_confidence_bucket{_OF_MODEL}[$__rate_interval]))",
            "{{le}}",
        ),
    ),
    "heatmap",
)

ANSWERS_ROW = Row(
    "Answers",
    (
        PREDICTIONS,
        Panel("Share of classes", "Of the answers of an hour.", "percentunit",
              (Query(f"sum by (model, class) (increase(clotline_predictions_total{_OF_MODEL}[1h])) / on (model) group_left () "
                     f"(sum by (model) (increase(clotline_predictions_total{_OF_MODEL}[1h])) > 0)",
                     "{{model}} {{class}}"),), highest=1.0),
        CONFIDENCE,
        Panel("Mean confidence", "Of the predicted class.", "percentunit",
              (Query(f"sum by (model, class) (rate(clotline_prediction_confidence_sum{_OF_MODEL}[$__rate_interval])) "
                     f"/ (sum by (model, class) (rate(clotline_prediction_confidence_count{_OF_MODEL}[$__rate_interval])) > 0)",
                     "{{model}} {{class}}"),), highest=1.0),
        Panel("Abstentions", "Share of answers of an hour from which the ensemble abstained.", "percentunit",
              (Query(f"clotline:abstention_share:1h{_OF_MODEL}", "{{model}}"),), highest=1.0),
        Panel("Abstentions a second", "The same as a rate.", "ops",
              (Query(f"sum by (model) (rate(clotline_abstentions_total{_OF_MODEL}[$__rate_interval]))", "{{model}}"),)),
    ),
)  # fmt: skip

INPUTS = Row(
    "Inputs",
    (
        Panel("Rejected inputs", "Refused before any network ran, by reason.", "ops",
              (Query(f"sum by (model, reason) (rate(clotline_rejected_inputs_total{_OF_SERVER}[$__rate_interval]))",
                     "{{model}} {{reason}}"),), "stacked"),
        Panel("Share rejected", "Of the inputs of 15 minutes.", "percentunit",
              (Query(f"clotline:rejected_share:15m{_OF_SERVER}", "{{server}}"),)),
        Panel("Tiles a bag", "Tiles of a slide that is asked as one bag.", "none",
              (_histogram_quantile(0.5, "clotline_bag_tiles", _OF_SERVER),
               _histogram_quantile(0.95, "clotline_bag_tiles", _OF_SERVER))),
        Panel("Decode time", "Of one tile: decoding and resizing.", "s",
              (_histogram_quantile(0.5, "clotline_decode_duration_seconds", _OF_SERVER),
               _histogram_quantile(0.95, "clotline_decode_duration_seconds", _OF_SERVER))),
        Panel("Looks of tiles", "Mean of each statistic (docs/drift.md).", "none",
              (Query(f"sum by (statistic) (rate(clotline_tile_appearance_sum{_OF_SERVER}[$__rate_interval])) "
                     f"/ (sum by (statistic) (rate(clotline_tile_appearance_count{_OF_SERVER}[$__rate_interval])) > 0)",
                     "{{statistic}}"),), highest=1.0),
        Panel("Bags", "Slides asked as one bag.", "ops",
              (Query(f"sum by (model) (rate(clotline_bag_tiles_count{_OF_SERVER}[$__rate_interval]))", "{{model}}"),)),
    ),
)  # fmt: skip

_DRIFT = '{server=~"$server",window="%s"}'


def _psi(window: str) -> Panel:
    of_window = _DRIFT % window
    return Panel(
        f"Drift, {window}",
        "PSI against the release's reference, by what is compared. Below 0.1 there is none; the alert asks for more than 0.25 and "
        "what chance gives (docs/drift.md).",
        "none",
        (Query(f"max by (model, quantity, statistic) (clotline:drift_psi{of_window})", "{{model}} {{quantity}} {{statistic}}"),),
    )  # fmt: skip


DRIFT = Row(
    "Drift",
    (
        _psi("1h"),
        _psi("24h"),
        Panel("Patients' worth in the window", "How much is compared, in patients; the alert asks for 50.", "none",
              (Query(f"max by (model, quantity, window) (clotline:drift_patients{_OF_SERVER})",
                     "{{model}} {{quantity}} {{window}}"),)),
        Panel("Where PSI may be by chance", "Upper end of what no drift gives, with so many patients in the window.", "none",
              (Query(f"max by (model, quantity, statistic, window) (clotline:drift_psi_by_chance{_OF_SERVER})",
                     "{{model}} {{quantity}} {{statistic}} {{window}}"),), width=12),
        Panel("Buckets that moved", "Share of a bucket within an hour, less its share in the reference: the five that moved most.",
              "percentunit",
              (Query(f"topk(5, abs(clotline:drift_share{_DRIFT % '1h'} - on (server, model, quantity, class, statistic, after, le) "
                     "group_left () clotline:reference_share))", "{{model}} {{quantity}} {{class}}{{statistic}} {{after}}..{{le}}"),),
              width=12),
    ),
)  # fmt: skip

ANSWERS = Dashboard(
    uid="clotline-answers",
    title="Clotline: answers and inputs",
    about="What the models answer, to which inputs, and drift against the release's reference (docs/drift.md).",
    rows=(ANSWERS_ROW, INPUTS, DRIFT),
    model=PUBLIC_MODEL,
)
