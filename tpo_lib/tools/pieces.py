"""Tokens as a reader knows them: the text that each adds, and the bytes of one that holds a part of a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel

_LETTERS = sorted(ByteLevel.alphabet(), key=ord)  # of byte-level BPE, one a byte: most bytes are their own
_BYTES = {letter: ord(letter) for letter in _LETTERS if ord(letter) < 256}
_OTHERS = [byte for byte in range(256) if chr(byte) not in _BYTES]
_BYTES |= dict(zip([letter for letter in _LETTERS if ord(letter) > 255], _OTHERS, strict=True))


class Pieces:
    """Cuts token ids into texts, of any tokenizer, in time linear in them.

    Tokens that make one character together have their bytes as pieces, and the last of them the character, too.

    Example:
        >>> from tpo_lib.files.load import POCKET, load_tokenizer
        >>> tokenizer = load_tokenizer(POCKET)
        >>> Pieces(tokenizer)([], tokenizer("a naïve cliché")["input_ids"])
        ['<|endoftext|>', 'a', ' n', 'a', '⟨C3⟩', '⟨AF⟩ï', 've', ' cliché']
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self._behind = tokenizer, {}  # the text of a token behind another
        self._added = set(getattr(tokenizer, "added_tokens_decoder", ()))  # they stand for text in any tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in repr(backend and backend.decoder)

    def __call__(self, before: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The text of each of `ids`, which stand behind the tokens `before`."""
        found, open_bytes, last = [], codecs.getincrementaldecoder("utf-8")("replace"), tuple(before[-1:])
        for token in ids:
            raw = self._bytes(token)
            if raw is None:
                open_bytes.reset()
                found.append(self._text(last, token))
            else:
                text = open_bytes.decode(raw)  # the characters that are complete now
                found.append(text if text.encode() == raw else f"⟨{raw.hex(' ').upper()}⟩{text}")
            last = (token,)
        return found

    def _bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for, None where it stands for text."""
        if token in self._added:
            return None
        name = self._tokenizer.convert_ids_to_tokens(token)
        if code := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # of sentencepiece, where a character is no token
            return bytes.fromhex(code[1])
        if self._byte_level and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return None

    def _text(self, last: tuple[int, ...], token: int) -> str:
        """Behind the token before it: alone, sentencepiece would drop the space that it begins with."""
        key = (*last, token)
        if key not in self._behind:
            head, whole, alone = (self._decode(ids) for ids in (last, key, (token,)))
            self._behind[key] = whole[len(head) :] if whole.startswith(head) else alone
        return self._behind[key]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if ids else ""
