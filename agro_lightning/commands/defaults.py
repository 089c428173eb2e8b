"""The defaults of the command line, which are the quick start's: configs/quickstart.yaml says the same."""

DATA_DEFAULTS = {
    "sources": [
        {"weight": 0.875, "ahead": 0, "name": "live"},
        {"paths": ["quickstart"], "weight": 0.125, "repeat": True, "score": False, "name": "offline"},
    ],
    "rewards": [{"class_path": "agro_lightning.rewards.ExactMatch"}],
    "engine": {"class_path": "agro_lightning.rollout.AutoEngine"},
}

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_steps": 150,
    "max_epochs": -1,  # max_steps alone ends a run, so that a finished one can go on with a larger one
    "gradient_clip_val": 0.5,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,  # then val_check_interval counts micro-batches over the whole run
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
