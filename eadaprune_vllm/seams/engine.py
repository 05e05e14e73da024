"""The engine: front ends ask it about images and videos, and it answers between its steps, at most one question after
each, so that requests in progress go on."""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import RLock, Thread
from typing import Any

from vllm import envs

from eadaprune_vllm.seams.wrap import wrap

_ASK = "eadaprune_ask"
_WAITING = "_eadaprune_waiting"
_LOCK = "_eadaprune_lock"
_CORE = "vllm.v1.engine.core"
_WATCH_SECONDS = 1.0
REFUSED = b""


def install() -> None:
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, _ASK, _ask)

    @wrap(f"{_CORE}:EngineCore.post_step")
    def post_step(original: Any, core: Any, model_executed: bool) -> None:
        original(core, model_executed)
        _answer_next(core)

    @wrap(f"{_CORE}:EngineCoreProc._notify_idle_state_callbacks")
    def notify_idle_state_callbacks(original: Any, core: Any) -> None:
        original(core)
        while _answer_next(core):
            pass

    for path in ("SyncMPClient._send_input", "InprocClient.get_output"):
        wrap(f"vllm.v1.engine.core_client:{path}")(_alone)

    for path in ("async_llm:AsyncLLM", "llm_engine:LLMEngine"):

        @wrap(f"vllm.v1.engine.{path}.__init__")
        def init(original: Any, llm: Any, *args: Any, **kwargs: Any) -> None:
            original(llm, *args, **kwargs)
            processor = llm.renderer.mm_processor
            processor.front_end.connect(llm.engine_core, processor.server_options)


def _alone(original: Any, client: Any, *args: Any, **kwargs: Any) -> Any:
    """LLM.embed and its like render, and ask, on a thread of their own while another one steps the engine. What is not
    made for two threads, a socket or an engine in this process, is of one at a time."""
    with _lock(client):
        return original(client, *args, **kwargs)


def _ask(core: Any, payload: bytes) -> Any:
    """Utility of the engine core: what rank 0 answers. Unless there is no loop that would come to it later, a promise
    of it, which is kept once the engine is neither paused nor asleep."""
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(core, EngineCoreProc):
        if core.model_executor.is_sleeping:
            raise RuntimeError("the engine is asleep; wake it up before it is sent images or videos")
        return _ask_in_time(core, payload)
    if _refuses(core):
        return REFUSED
    promise: Future[bytes] = Future()
    vars(core).setdefault(_WAITING, deque()).append((payload, promise))
    return promise


def _answer_next(core: Any) -> bool:
    """Whether a question was answered."""
    waiting = vars(core).get(_WAITING)
    if not waiting or (not _refuses(core) and (core.is_scheduler_paused() or core.model_executor.is_sleeping)):
        return False
    payload, promise = waiting.popleft()
    try:
        promise.set_result(REFUSED if _refuses(core) else _ask_in_time(core, payload))
    except TimeoutError:
        raise  # replies are left behind: the engine dies of it, as of a step, and tells all that wait
    except Exception as error:
        promise.set_exception(error)
    return True


def _refuses(core: Any) -> bool:
    """Whether it refuses requests while it is paused, and with them questions, as releases from 0.33 do in some modes;
    or else both wait."""
    return bool(getattr(core, "reject_new_requests", False))


def _ask_in_time(core: Any, payload: bytes) -> bytes:
    """What rank 0 answers, within the time that vLLM gives a step."""
    return ask_workers(core, payload, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def ask_workers(core: Any, payload: bytes, seconds: float | None = None) -> bytes:
    """What rank 0 answers, at once.

    Args:
        core: an engine core.
        payload: packed questions.
        seconds: how long all ranks may take. Where one fails in the encoder, others wait for it in a collective.

    Raises:
        TimeoutError: if they take longer; the executor is then of no use any more.
    """
    answer: bytes = core.model_executor.collective_rpc("eadaprune_decide", timeout=seconds, args=(payload,))[0]
    return answer


def blocking(client: Any) -> Callable[[bytes], bytes] | None:
    """How to ask by an engine client of vLLM's that blocks; None if it does not."""
    if core := getattr(client, "engine_core", None):  # in this process

        def ask(payload: bytes) -> Any:
            with _lock(client):
                return getattr(core, _ASK)(payload)

        return ask
    if call := getattr(client, "call_utility", None):

        def ask_process(payload: bytes) -> bytes:
            """On a thread of its own: vLLM tells whoever waits for a utility nothing of an engine that dies."""
            result: Future[bytes] = Future()
            Thread(target=_resolve, args=(result, call, _ASK, payload), daemon=True).start()
            while not wait({result}, _WATCH_SECONDS).done:
                client.ensure_alive()
            return result.result()

        return ask_process
    return None


def _resolve(result: Future[Any], function: Callable[..., Any], *args: Any) -> None:
    """Have ``result`` be what the function returns or raises."""
    try:
        result.set_result(function(*args))
    except Exception as error:
        result.set_exception(error)


def _lock(client: Any) -> RLock:
    """Of a client, for whoever uses it or its engine."""
    lock: RLock = vars(client).setdefault(_LOCK, RLock())
    return lock


class AsyncEngines:
    """Asks by an engine client that does not block; of several engines the one that answers fewest of its questions.

    Args:
        client: of vLLM's.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._number = itertools.count(client.client_index)
        self._busy: Counter[bytes] = Counter()

    @property
    def at_once(self) -> int:
        """How many questions may be asked at a time."""
        return len(self._client.core_engines)

    async def __call__(self, payload: bytes) -> bytes:
        """Raises:
        EngineDeadError: if the engine dies meanwhile, which vLLM would not tell who waits for a utility.
        RetryableRequestError: if the engine is paused, and refuses requests meanwhile; or if it is no more one of the
            client's (elastic EP), and its answer may never come.
        """
        from vllm.exceptions import RetryableRequestError
        from vllm.v1.engine.exceptions import EngineDeadError

        engines, first = self._client.core_engines, next(self._number)
        in_turn = (engines[(first + number) % len(engines)] for number in range(len(engines)))
        engine = min(in_turn, key=self._busy.__getitem__)
        self._busy[engine] += 1
        call = asyncio.ensure_future(self._client._call_utility_async(_ASK, payload, engine=engine))
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_WATCH_SECONDS)
                if self._client.resources.engine_dead and not call.done():
                    raise EngineDeadError
                if engine not in self._client.core_engines and not call.done():
                    raise RetryableRequestError("The server was scaled down. Please retry.")
            answer: bytes = call.result()
            if answer == REFUSED:
                raise RetryableRequestError("Generation is paused. Please retry after it resumes.")
            return answer
        finally:
            self._busy[engine] -= 1
            call.cancel()
