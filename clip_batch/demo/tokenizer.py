"""The tokenizer of the demo's model: a small bilingual vocabulary, with bytes for all other characters.

Text is brought to the form of `captions.plain` and split into words, digits and Chinese characters;
words are split into byte-pair sub-words. A character that training did not see becomes its UTF-8
bytes, so any text has tokens. Padding is token 0, and the end of text is the largest token, where
open_clip takes the features of a text by default.
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
    """A tokenizer around `model` that normalizes and splits texts."""
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
    """A tokenizer with at most `vocabulary` tokens learned from `texts`, and 258 more.

    Its tokens are, in order: padding, the 256 bytes, the learned characters and sub-words, and
    the end of text, which is appended to every text.
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
    learned = json.loads(learner.to_str())["model"]
    tokens = [PAD, *_BYTES, *sorted(learned["vocab"], key=learned["vocab"].__getitem__), END]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, right in learned["merges"]]
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
    """Write the three files from which transformers loads the tokenizer without network."""
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
