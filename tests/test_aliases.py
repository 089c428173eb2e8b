"""Module names of version 0.1: they import with a warning, and configs may name them."""

import importlib
import sys

import pytest
import yaml

from agro_lightning.aliases import MOVED
from agro_lightning.commands import fit
from agro_lightning.rollout.engines.vllm import VLLMEngine
from agro_lightning.training.callbacks.publish import PublishWeights
from agro_lightning.training.strategy import Sharded


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_imports_as_the_module_that_took_its_place(old):
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {MOVED[old]}; the old name goes with version 0.3"):
        found = importlib.import_module(old)
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public and all(getattr(found, name) is getattr(new, name) for name in public)
    assert new.__spec__ is not None and new.__spec__.name == MOVED[old]


@pytest.mark.filterwarnings("ignore:agro_lightning:FutureWarning")
def test_a_config_of_version_0_1_instantiates(tmp_path):
    engine = {
        "class_path": "agro_lightning.rollout.vllm_engine.VLLMEngine",
        "init_args": {"python": sys.executable},
    }
    config = {
        "run_dir": str(tmp_path / "run"),
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"class_path": "agro_lightning.strategy.Sharded"},
            "callbacks": [{"class_path": "agro_lightning.publish.PublishWeights", "init_args": {"every": 2}}],
        },
        "data": {"engine": engine},
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(config))
    made = fit.AgroCLI(
        fit.AgroModule,
        fit.AgroDataModule,
        run=False,
        args=["--config", str(path)],
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
    assert type(made.datamodule.engine) is VLLMEngine
    assert type(made.trainer.strategy) is Sharded
    (callback,) = [item for item in made.trainer.callbacks if isinstance(item, PublishWeights)]
    assert callback.every == 2
