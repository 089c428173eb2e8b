"""Keeping libraries' output out of a command's."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_progress_bars(*, in_logs: bool = False) -> Iterator[None]:
    """Hides transformers' bars of loading and saving weights; with `in_logs` only where no terminal draws
    them."""
    from transformers.utils import logging as bars

    if in_logs and sys.stderr.isatty():
        yield
        return
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hides progress bars, warnings, and what these loggers say below an error."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    with warnings.catch_warnings(), without_progress_bars():
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
