"""How Triton works: queues against work, batches, processors, memory, GPUs, cache, restarts."""

from __future__ import annotations

from deploy.dashboards import ANY_MODEL, Dashboard, Panel, Query, Row

_OF_MODEL = '{server=~"$server",model=~"$model"}'


def _compute(part: str) -> Query:
    expr = (
        f"sum by (model) (rate(nv_inference_compute_{part}_duration_us{_OF_MODEL}[$__rate_interval])) / 1e6 "
        f"/ (sum by (model) (rate(nv_inference_request_success{_OF_MODEL}[$__rate_interval])) > 0)"
    )
    return Query(expr, f"{{{{model}}}} {part}")


WORK = Row(
    "Work",
    (
        Panel("Queue against compute", "Mean time of a request in the queue, and being worked on. A queue above compute means more "
              "instances, larger batches, or fewer requests.", "s",
              (Query(f"max by (model) (clotline:model_queue_seconds:5m{_OF_MODEL})", "{{model}} queue"),
               Query(f"max by (model) (clotline:model_compute_seconds:5m{_OF_MODEL})", "{{model}} compute")), width=12),
        Panel("Parts of compute", "Mean time of a request in input, inference and output.", "s",
              (_compute("input"), _compute("infer"), _compute("output")), width=12),
        Panel("Busy instances", "Mean number of a model's instances at work; of slide_classifier, also those that wait for tiles.",
              "none", (Query(f"sum by (model) (clotline:model_busy_instances:5m{_OF_MODEL})", "{{model}}"),)),
        Panel("Pending requests", "Waiting for an instance, at this moment.", "none",
              (Query(f"sum by (model) (nv_inference_pending_request_count{_OF_MODEL})", "{{model}}"),)),
        Panel("Batch sizes", "Tiles in one execution, on average.", "none",
              (Query(f"max by (model) (clotline:model_batch_size:5m{_OF_MODEL})", "{{model}}"),)),
        Panel("Tiles and slides a second", "Items inferred, by model.", "ops",
              (Query(f"sum by (model) (rate(nv_inference_count{_OF_MODEL}[$__rate_interval]))", "{{model}}"),)),
        Panel("Latency by model, p95", "In Triton, within the last minute.", "s",
              (Query('max by (model) (nv_inference_request_summary_us{server=~"$server",model=~"$model",quantile="0.95"}) / 1e6',
                     "{{model}}"),)),
        Panel("Queue by model, p95", "Wait in Triton's queue, within the last minute.", "s",
              (Query('max by (model) (nv_inference_queue_summary_us{server=~"$server",model=~"$model",quantile="0.95"}) / 1e6',
                     "{{model}}"),)),
    ),
)  # fmt: skip

MACHINE = Row(
    "Machine",
    (
        Panel("Processors", "Share of all cores of the machine that are busy.", "percentunit",
              (Query('nv_cpu_utilization{server=~"$server"}', "{{server}}"),), highest=1.0),
        Panel("Memory", "Of the server's processes (proportional), and of the machine.", "bytes",
              (Query('clotline_memory_bytes{server=~"$server"}', "{{server}} server"),
               Query('nv_cpu_memory_used_bytes{server=~"$server"}', "{{server}} machine, used"),
               Query('nv_cpu_memory_total_bytes{server=~"$server"}', "{{server}} machine, all"))),
        Panel("Growth of memory", "Slope of the server's memory over an hour; a release is a step.", "Bps",
              (Query('deriv(clotline_memory_bytes{server=~"$server"}[1h])', "{{server}}"),)),
        Panel("Pinned memory", "Pool that Triton stages tensors in for GPUs.", "bytes",
              (Query('nv_pinned_memory_pool_used_bytes{server=~"$server"}', "{{server}} used"),
               Query('nv_pinned_memory_pool_total_bytes{server=~"$server"}', "{{server}} all"))),
        Panel("Restarts", "Of tritonserver, and models loaded anew because a stub died, within an hour.", "none",
              (Query('increase(clotline_server_restarts_total{server=~"$server"}[1h])', "tritonserver"),
               Query('sum by (model) (increase(clotline_model_replacements_total{server=~"$server"}[1h]))', "{{model}}"))),
        Panel("Targets", "What Prometheus could scrape.", "none",
              (Query("min by (job, instance) (up)", "{{job}} {{instance}}"),), "states"),
    ),
)  # fmt: skip

GPU = Row(
    "GPU",
    (
        Panel("GPU utilisation", "Share of time in which a kernel ran.", "percentunit",
              (Query('nv_gpu_utilization{server=~"$server"}', "{{gpu_uuid}}", needs_gpu=True),), highest=1.0),
        Panel("GPU memory", "Used, and of how much.", "bytes",
              (Query('nv_gpu_memory_used_bytes{server=~"$server"}', "{{gpu_uuid}} used", needs_gpu=True),
               Query('nv_gpu_memory_total_bytes{server=~"$server"}', "{{gpu_uuid}} all", needs_gpu=True))),
        Panel("GPU power", "Drawn now, and the limit.", "watt",
              (Query('nv_gpu_power_usage{server=~"$server"}', "{{gpu_uuid}}", needs_gpu=True),
               Query('nv_gpu_power_limit{server=~"$server"}', "{{gpu_uuid}} limit", needs_gpu=True))),
    ),
)  # fmt: skip

CACHE = Row(
    "Response cache (only of a server that is started with one)",
    (
        Panel("Cache lookups", "Answers from the cache, and those that had to be computed.", "ops",
              (Query('rate(nv_cache_num_hits{server=~"$server"}[$__rate_interval])', "hits"),
               Query('rate(nv_cache_num_misses{server=~"$server"}[$__rate_interval])', "misses")), width=12),
        Panel("Cache fill", "Share of the cache that is used.", "percentunit",
              (Query('nv_cache_util{server=~"$server"}', "{{server}}"),), width=12, highest=1.0),
    ),
)  # fmt: skip

SERVER_DASHBOARD = Dashboard(
    uid="clotline-server",
    title="Clotline: server",
    about="How Triton works. On a live server a model's releases are summed; the label release tells them apart.",
    rows=(WORK, MACHINE, GPU, CACHE),
    model=ANY_MODEL,
)
