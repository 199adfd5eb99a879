"""The strategy and screen of a run, and the process-wide settings that hold while it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from e2e.images.threads import decoder_threads
from e2e.log import Screen
from e2e.parallel import Strategy, build_strategy, float32_precision, pick_device
from e2e.settings.configs import find_config
from e2e.settings.schema import Settings


@contextmanager
def process_settings(settings: Settings) -> Iterator[None]:
    """Set what holds for the whole process inside the block, and restore it afterwards.

    These are the precision of float32 products and the number of decoder threads.
    """
    with float32_precision(settings.engine.precision), decoder_threads(settings.data.workers):
        yield


@contextmanager
def session(settings: Settings) -> Iterator[tuple[Strategy, Screen]]:
    """Strategy and screen of a run, closed at the end of the block; see also :func:`process_settings`."""
    engine = settings.engine
    with process_settings(settings):
        strategy = build_strategy(
            pick_device(engine.device),
            engine.strategy,
            deepspeed=find_config(engine.deepspeed),
            timeout=60 * engine.timeout,
        )
        screen = Screen(strategy.is_leader, timestamps=True)
        try:
            with strategy.detect_lost_ranks():
                yield strategy, screen
        finally:
            screen.pause()
            strategy.close()
