"""The demo model's tokenizer: a small bilingual vocabulary with bytes for all the rest.

Text is brought to the plain form of `captions.plain`, split into words, digits and Chinese
characters, and the words into byte-pair sub-words. A character never seen in training becomes
its UTF-8 bytes, so that any text has tokens. Padding is token 0 and the end of text the largest
token, which is where open_clip takes a text's features by default.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CONTEXT_LENGTH = 40
PAD = "<|pad|>"
END = "<|end|>"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SEPARATORS = r"[\s[\p{P}&&[^#*]]]+"


def _shell(model: models.Model) -> Tokenizer:
    """A tokenizer around `model` with the text's normalisation and splitting."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['\u2018\u2019]"), ""),
            normalizers.NFC(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SEPARATORS), "removed"),
            pre_tokenizers.Split(Regex(r"[\p{Han}\p{N}#*]"), "isolated"),
        ]
    )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` learnt tokens, and 258 more, from the words of `texts`.

    Its tokens are, in order: padding, the 256 bytes, the characters and sub-words learnt, and
    the end of text, which is put after every text.
    """
    learner = _shell(models.BPE())
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=3,
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    tokens = [PAD, *_BYTES, *sorted(learnt["vocab"], key=learnt["vocab"].__getitem__), END]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, right in learnt["merges"]]
    tokenizer = _shell(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}",
        pair=f"$A $B {END}",
        special_tokens=[(END, vocab[END])],
    )
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the three files from which transformers loads the tokenizer with no network."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": PAD, "eos_token": END}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
