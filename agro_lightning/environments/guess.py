"""A game for a first run: guess a number from 1 to 7, told after each guess whether it is higher or lower."""

from typing import Any


class GuessNumber:
    """The row's `answer` is the number; the game follows from it alone, nothing is drawn.

    A guess is one turn's text. The answer is "+" (the number is higher), "-" (lower), or the end.

    Args:
        guesses: after which the game is lost; 3 are enough for who halves what is left.

    Example:
        >>> game = GuessNumber()
        >>> game.reset(answer="6"), game.respond("4"), game.respond("6"), game.get_reward()
        (None, '+', None, 1.0)
    """

    def __init__(self, guesses: int = 3) -> None:
        if guesses < 1:
            raise ValueError(f"guesses is {guesses}; it must be at least 1")
        self.guesses = guesses
        self._number, self._left, self._won = 0, 0, False

    def reset(self, *, answer: str, **row: Any) -> None:
        """Begins a game for the number that the row's answer names."""
        self._number, self._left, self._won = int(answer), self.guesses, False

    def respond(self, text: str) -> str | None:
        """Answers a guess; None ends the game. A text that is no number counts as a guess that is too low."""
        self._left -= 1
        guess = int(text) if text.isdecimal() and text.isascii() else 0
        self._won = guess == self._number
        if self._won or not self._left:
            return None
        return "+" if self._number > guess else "-"

    def get_reward(self) -> float:
        """1 for a number that was found, 0 else."""
        return float(self._won)
