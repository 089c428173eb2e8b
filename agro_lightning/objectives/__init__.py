"""Losses over prompt groups: AGRO, and the baselines that it is compared with."""

from agro_lightning.objectives.agro import Agro, agro_coefficients, agro_loss
from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput
from agro_lightning.objectives.groups import Groups
from agro_lightning.objectives.grpo import Grpo
from agro_lightning.objectives.regularized_pg import RegularizedPG
from agro_lightning.objectives.rloo import Rloo, RlooFrozenKL
from agro_lightning.objectives.score_term import AgroScoreTerm

__all__ = [
    "Agro",
    "AgroScoreTerm",
    "Groups",
    "Grpo",
    "LossInputs",
    "Objective",
    "ObjectiveOutput",
    "RegularizedPG",
    "Rloo",
    "RlooFrozenKL",
    "agro_coefficients",
    "agro_loss",
]
