"""Exports an engine's counters to Prometheus: they are read from the device at a scrape only.

    pip install prometheus-client
    python examples/prometheus_stats.py --port 9464 --seconds 60     # SmolLM2 on engine.py
    curl localhost:9464/metrics

In a custom server: keep the newest `echo.StepStats` where `EchoCollector` can fetch it, and
register the collector once. Useful in a dashboard, as ratios of `rate(...[1m])`:

- `echo_emitted_tokens_total / echo_requests_total`: tokens a request emits in a step;
- `echo_accepted_drafts_total / echo_draft_tokens_total`: draft acceptance rate;
- `echo_pad_tokens_total / echo_verify_tokens_total`: padding beside each verify token;
- `echo_reassigned_total / echo_released_total`: released tokens that other requests took.
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
    "steps": "Steps of the target model",
    "layers": "Layers drafted, summed over steps",
    "requests": "Requests verified, summed over steps",
    "verify_tokens": "Tokens verified for requests, roots included",
    "pad_tokens": "Padding of verify batches",
    "draft_tokens": "Draft tokens verified",
    "accepted_drafts": "Draft tokens accepted",
    "emitted_tokens": "Tokens emitted",
    "truncated": "Requests that failed a gate, summed over steps",
    "starved": "Requests that passed but found no verify token left, summed over steps",
    "released": "Verify tokens that truncated requests took less than an even share",
    "reassigned": "Released verify tokens that other requests took",
    "invalid": "Faulty draft scores",
    "no_output": "Verified requests that emitted nothing, summed over steps",
    "not_scheduled": "Live requests without a verify token, summed over steps",
}
"""Members of :class:`echo.stats.StepCounts`, and what they say."""


class EchoCollector(Collector):
    """Turns the newest counters into Prometheus counters at each scrape.

    Args:
        newest: returns the counters so far, in the exporter's thread. An attribute look-up is
            enough: the counters are a value.
        labels: of this engine, such as ``{"model": "smollm2"}``.
    """

    def __init__(
        self, newest: Callable[[], echo.StepStats], labels: dict[str, str] | None = None
    ) -> None:
        self.newest, self.labels = newest, labels or {}

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called at a scrape: one device-to-host copy."""
        counts = self.newest().read()
        for name, text in METRICS.items():
            family = CounterMetricFamily(f"echo_{name}", text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), getattr(counts, name))
            yield family


def main() -> None:
    """Serves prompts in a loop while the exporter runs."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
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
    prompts = encode(tokenizer, [prompt for rows in EVALUATION.values() for prompt in rows])
    end = time.monotonic() + args.seconds
    for first in itertools.cycle(range(0, len(prompts), 8)):
        for _ in engine.generate(prompts[first : first + 8], 48):
            if time.monotonic() > end:
                print(engine.stats.read())
                return


if __name__ == "__main__":
    main()
