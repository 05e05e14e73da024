"""The stages of pruning in vLLM's traces, as an OTLP collector receives them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from threading import Thread
from typing import Any

import pytest
from conftest import Start
from harness import Server, content, eventually
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from PIL import Image

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        spans = self.spans = list[Span]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                spans.extend(span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1/traces"

    def trace_of_next_request(self, expected: int) -> list[Span]:
        """The spans of the trace that vLLM's next span of a request is of, of which there should be ``expected``."""
        found: list[Span] = []

        def is_whole() -> bool:
            for request in [span for span in self.spans if span.name == "llm_request"]:
                found[:] = [span for span in self.spans if span.trace_id == request.trace_id]
                if len(found) >= expected:
                    return True
            return False

        eventually(is_whole)
        self.spans.clear()
        return found


@contextmanager
def serving(collector: Collector) -> Iterator[Collector]:
    thread = Thread(target=collector.http.serve_forever)
    thread.start()
    yield collector
    collector.http.shutdown()
    collector.http.server_close()
    thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with serving(Collector()) as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(start: Start, collector: Collector) -> Server:
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--otlp-traces-endpoint", collector.url]
    flags += ["--eadaprune-report-cached"]
    return start("traced", *flags, "--limit-mm-per-prompt", '{"image": 4}', **env)


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: pair.value.int_value for pair in span.attributes if pair.key.startswith("eadaprune.")}


def children(trace: list[Span], parent: Span) -> list[Span]:
    return sorted((s for s in trace if s.parent_span_id == parent.span_id), key=lambda s: s.start_time_unix_nano)


def test_stages_are_spans_of_the_clients_trace(
    traced: Server, collector: Collector, images: dict[str, Image.Image]
) -> None:
    before = time.time_ns()
    answer: Any = traced.client.with_options(
        default_headers={"traceparent": f"00-{TRACE}-{CALLER}-01"}
    ).chat.completions.create(
        model=traced.NAME,
        messages=[{"role": "user", "content": content(images["coffee"], images["flat"])}],
        max_tokens=2,
    )
    trace = collector.trace_of_next_request(1 + 1 + 2 * (1 + 3))
    assert {span.trace_id.hex() for span in trace} == {TRACE}
    outer, request = (next(s for s in trace if s.name == name) for name in ("eadaprune", "llm_request"))
    assert outer.parent_span_id.hex() == request.parent_span_id.hex() == CALLER
    report = answer.eadaprune
    assert attributes(outer) == {
        "eadaprune.visual_tokens": 1152,
        "eadaprune.kept_tokens": report["kept_tokens"],
        "eadaprune.items": 2,
        "eadaprune.cached_items": 0,
    }
    items = children(trace, outer)
    assert [item.name for item in items] == ["eadaprune.image"] * 2
    for item in items:
        stages = children(trace, item)
        assert [stage.name for stage in stages] == [f"eadaprune.{stage}" for stage in ("encode", "spectrum", "select")]
        assert before < item.start_time_unix_nano == stages[0].start_time_unix_nano
        assert item.end_time_unix_nano == stages[-1].end_time_unix_nano <= outer.end_time_unix_nano < time.time_ns()
        for stage, after in pairwise(stages):
            assert stage.end_time_unix_nano == after.start_time_unix_nano
    seconds = sum(item.end_time_unix_nano - item.start_time_unix_nano for item in items) / 1e9
    assert seconds == pytest.approx(report["seconds"], rel=0.5)


def test_without_a_clients_trace_vllms_span_is_in_ours(
    traced: Server, collector: Collector, images: dict[str, Image.Image]
) -> None:
    traced.ask(images["chelsea"])
    trace = collector.trace_of_next_request(1 + 1 + 1 + 3)
    outer, request = (next(s for s in trace if s.name == name) for name in ("eadaprune", "llm_request"))
    assert not outer.parent_span_id
    assert request.parent_span_id == outer.span_id


def test_a_cached_image_has_no_stages(traced: Server, collector: Collector, images: dict[str, Image.Image]) -> None:
    traced.ask(images["rocket"])
    collector.trace_of_next_request(6)
    traced.ask(images["rocket"])
    (outer,) = (span for span in collector.trace_of_next_request(2) if span.name == "eadaprune")
    assert attributes(outer)["eadaprune.cached_items"] == 1


def test_text_alone_is_traced_as_by_vllm(traced: Server, collector: Collector) -> None:
    for _ in range(2):  # spans arrive in the order in which they end: before the second request's, all of the first
        traced.ask("Hello")
    eventually(lambda: len([span for span in collector.spans if span.name == "llm_request"]) == 2)
    assert not [span.name for span in collector.spans if span.name.startswith("eadaprune")]
    assert not any(span.parent_span_id for span in collector.spans if span.name == "llm_request")
