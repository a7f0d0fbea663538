"""Small stand-ins that several test modules share."""

END = 256


class Bytes:
    """A tokenizer whose tokens are bytes, plus END_OF_TEXT."""

    end_of_text, vocab_size = END, 257

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i != END)
