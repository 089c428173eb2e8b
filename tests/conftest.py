"""Tiny real models and the shipped tokenizer, shared by all tests."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_lm

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start the tests with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does nohup
torch.set_num_threads(1)


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_lm(request):
    """One random-weights model of each architecture style that is supported for certain."""
    return tiny_lm(request.param)


@pytest.fixture(scope="session")
def quickstart_tokenizer():
    from agro_lightning.models.pretrained import load_tokenizer

    return load_tokenizer("quickstart")
