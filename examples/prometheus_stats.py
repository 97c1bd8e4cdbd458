"""Exports an engine's counters to Prometheus: read from the device when somebody scrapes, and only then.

    pip install prometheus-client
    python examples/prometheus_stats.py --port 9464 --seconds 60     # SmolLM2 on the paged engine of engine.py
    curl localhost:9464/metrics

In a server of one's own: keep the newest `echo.StepStats` where `EchoCollector` can fetch it, and register the collector once.
Useful in a dashboard: `rate(echo_emitted_tokens_total[1m]) / rate(echo_requests_total[1m])`, tokens a request emits in a step;
`rate(echo_pad_rows_total[1m]) / rate(echo_rows_total[1m])`, rows launched for nobody;
`rate(echo_redealt_rows_total[1m]) / rate(echo_released_rows_total[1m])`, how much of what gates free is used by others.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

import echo

METRICS = {
    "steps": ("steps", "Steps of the target model"),
    "layers": ("layers", "Layers drafted, summed over steps"),
    "requests": ("requests", "Requests verified, summed over steps"),
    "rows": ("verify_tokens", "Rows verified for requests, roots included"),
    "pad_rows": ("pad_tokens", "Rows launched and given to nobody"),
    "drafted_tokens": ("draft_tokens", "Drafted tokens verified"),
    "accepted_tokens": ("accepted_drafts", "Drafted tokens accepted"),
    "emitted_tokens": ("emitted_tokens", "Tokens emitted by speculative steps"),
    "truncated_requests": ("truncated", "Requests that failed a gate, summed over steps"),
    "starved_requests": (
        "starved",
        "Requests that passed and found no row left, summed over steps",
    ),
    "released_rows": ("released", "Rows that truncated requests held less than their share"),
    "redealt_rows": ("reassigned", "Released rows that other requests held beyond their shares"),
    "invalid_candidates": ("invalid", "Draft scores that were no numbers"),
    "silent_requests": ("no_output", "Verified requests that emitted nothing, summed over steps"),
    "unserved_requests": ("not_scheduled", "Live requests that got no row, summed over steps"),
}
"""Name -> member of :class:`echo.stats.StepCounts`, and what it says."""


class EchoCollector(Collector):
    """Turns the newest counters into Prometheus counters, at each scrape.

    Args:
        newest: gives the counters so far. It is called in the exporter's thread: a plain attribute look-up is enough, since the
            counters are a value that nobody changes.
        labels: of this engine, for example ``{"model": "smollm2"}``.
    """

    def __init__(
        self, newest: Callable[[], echo.StepStats], labels: dict[str, str] | None = None
    ) -> None:
        self.newest, self.labels = newest, labels or {}

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called at a scrape: the one read-back."""
        counts = self.newest().read()
        for name, (member, text) in METRICS.items():
            family = CounterMetricFamily(f"echo_{name}", text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), getattr(counts, member))
            yield family


def main() -> None:
    """Serves prompts over and over while the exporter runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=9464)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).with_name("smollm2")))
    from model import encode, load
    from prompts import EVALUATION
    from serve import engine as serving

    model, tokenizer = load()
    engine = serving(model, tokenizer)
    REGISTRY.register(EchoCollector(lambda: engine.stats, {"model": "smollm2"}))
    start_http_server(args.port)
    print(f"http://localhost:{args.port}/metrics, for {args.seconds:.0f} seconds", flush=True)
    prompts, end = (
        encode(tokenizer, [prompt for rows in EVALUATION.values() for prompt in rows]),
        time.monotonic() + args.seconds,
    )
    for prompt in itertools.cycle(range(0, len(prompts), 8)):
        for _ in engine.generate(prompts[prompt : prompt + 8], 48):
            if time.monotonic() > end:
                print(engine.stats.read())
                return


if __name__ == "__main__":
    main()
