"""A tokenizer of bytes, made by code: no download, no training, any text.

>>> make_byte_tokenizer()("Hi")["input_ids"]
[256, 72, 105]
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = NUM_BYTES
VOCABULARY_SIZE = NUM_BYTES + 1
"""Token ids the tokenizer can produce; a model may have more rows, as padding to a round number."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, by byte value.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and after.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [value for value in range(NUM_BYTES) if value not in printable]
    return [chr(value) if value in printable else chr(NUM_BYTES + others.index(value)) for value in range(NUM_BYTES)]


def make_byte_tokenizer(max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0 to 255 are the bytes of the UTF-8 text, after one `<|endoftext|>` (256).

    The leading token gives the model something to predict the first byte from, so every byte is scored. It
    is also the end-of-text and the padding token.

    Args:
        max_length: The model's longest sequence, in tokens; None for no limit.

    Returns:
        The tokenizer; `save_pretrained` writes what `AutoTokenizer.from_pretrained` reads.
    """
    vocabulary = {character: value for value, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    limit = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **limit,
    )
