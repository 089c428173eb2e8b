"""An engine that takes its time for every token, so that new weights come amid completions."""

import time

from agro_lightning.rollout import BatchedDecoding


class UnhurriedEngine(BatchedDecoding):
    """BatchedDecoding with a pause before each step."""

    def in_flight(self, sampling, *, policy_version, caches):
        decoding = super().in_flight(sampling, policy_version=policy_version, caches=caches)
        step = decoding.step

        def unhurried():
            time.sleep(0.06)
            return step()

        decoding.step = unhurried
        return decoding
