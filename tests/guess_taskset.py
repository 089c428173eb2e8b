"""A multi-turn taskset in verifiers' own form: the policy names a letter, the environment says yes or no."""

import asyncio
from collections.abc import Iterator

import verifiers.v1 as vf
from slow_games import pause_between_turns

LETTERS = "abcdefgh"


class GuessData(vf.TaskData):
    letter: str
    turns: int = 3


class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def tried(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class GuessConfig(vf.TasksetConfig):
    tasks: int = 6
    turns: int = 3
    branching: bool = False


class GuessEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessEnvConfig]):
    """Answers each reply by its length and the letter wanted; ends after some turns."""

    async def run(self, task, agents):
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            for turn in range(1, task.data.turns):
                if segment.terminated:
                    break
                await asyncio.to_thread(pause_between_turns)
                hit = task.data.letter in segment.last_reply
                segment = await interaction.turn(f"{turn} {'yes' if hit else 'no'}")
        found = [
            task.data.letter in (message.content or "") for message in interaction.trace.assistant_messages
        ]
        interaction.trace.record_reward("found", float(any(found)), 1.0)


class GuessTaskset(vf.Taskset[GuessTask, GuessConfig]):
    def load(self) -> Iterator[GuessTask]:
        for index in range(self.config.tasks):
            letter = LETTERS[index % len(LETTERS)]
            data = GuessData(prompt=f"which letter? {index}", letter=letter, turns=self.config.turns)
            yield GuessTask(data, self.config.task)


__all__ = ["GuessEnv", "GuessTaskset"]
