"""Tokens of text: characters, or the bytes of UTF-8."""

import dataclasses

import numpy as np

from paramshare.data.error import DataError


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a text stand for.

    Attributes:
      characters: the character of each token, in order; "" for bytes, of which there are 256.

    Example:
      >>> vocabulary = Vocabulary.of("to be or not to be")
      >>> vocabulary.encode("rent").tolist(), vocabulary.decode([4, 1, 3, 6])
      ([5, 2, 3, 6], 'obnt')
      >>> Vocabulary().encode("é").tolist()
      [195, 169]
    """

    characters: str = ""

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The characters that occur in a text, sorted."""
        return cls("".join(sorted(set(text))))

    @property
    def size(self) -> int:
        """The number of different tokens."""
        return len(self.characters) or 256

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, (N,) int32.

        Raises:
          DataError: if a character is not in the vocabulary.
        """
        if not self.characters:
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)
        place = {character: number for number, character in enumerate(self.characters)}
        missing = sorted(set(text) - set(place))
        if missing:
            raise DataError(
                f"the text has {', '.join(map(repr, missing[:5]))}, which the vocabulary does not "
                f"have; its {self.size} characters are {self.characters!r}: leave out the others"
            )
        return np.fromiter((place[character] for character in text), np.int32, len(text))

    def decode(self, tokens: np.ndarray | list[int]) -> str:
        """The text of tokens (N,); bytes that are not UTF-8 become U+FFFD."""
        if not self.characters:
            return bytes(int(token) for token in tokens).decode(errors="replace")
        return "".join(self.characters[int(token)] for token in tokens)
