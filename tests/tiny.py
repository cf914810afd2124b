"""Tiny random models, tokenizers, classifiers and pairs for the tests, in the hub's format; no network."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from tpo_lib.data import EncodedPair

VOCAB = 64
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
GPT = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
} | ENDS


def _build(family: str, seed: int, vocab: int, **settings):
    """A one-layer causal model of a family of architectures that transformers knows."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocab, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def llama(seed: int = 0, vocab: int = VOCAB):
    """A one-layer Llama with tied embeddings."""
    return _build("Llama", seed, vocab, **SHAPE, max_position_embeddings=128, tie_word_embeddings=True)


def gpt2(seed: int = 0, vocab: int = VOCAB):
    """A one-layer GPT-2 with its usual dropout configured (and, as everywhere here, off)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **GPT, **ENDS)).eval()


def gemma2(seed: int = 0, vocab: int = VOCAB):
    """A one-layer Gemma 2: its logits are soft-capped after the head."""
    return _build("Gemma2", seed, vocab, **SHAPE, head_dim=8, final_logit_softcapping=2.0)


def cohere(seed: int = 0, vocab: int = VOCAB):
    """A one-layer Cohere: its logits are multiplied after the head."""
    return _build("Cohere", seed, vocab, **SHAPE, logit_scale=0.3)


def granite(seed: int = 0, vocab: int = VOCAB):
    """A one-layer Granite: its logits are divided after the head."""
    return _build("Granite", seed, vocab, **SHAPE, logits_scaling=3.0)


def gptj(seed: int = 0, vocab: int = VOCAB):
    """A one-layer GPT-J: its head has a bias."""
    model = _build("GPTJ", seed, vocab, **GPT | {"initializer_range": 0.02}, **ENDS, rotary_dim=4)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def opt(seed: int = 0, vocab: int = VOCAB):
    """A one-layer OPT: its table of positions is two longer than its positions."""
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "init_std": 0.3}
    return _build("OPT", seed, vocab, **shape, num_attention_heads=2, max_position_embeddings=128, pad_token_id=1)


def phi3(seed: int = 0, vocab: int = VOCAB):
    """A one-layer Phi-3 whose rope changes for the whole batch once a sequence passes 64 tokens."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    positions = {"max_position_embeddings": 128, "original_max_position_embeddings": 64}
    return _build("Phi3", seed, vocab, **SHAPE, **positions, rope_parameters=rope)


WINDOW = 6  # of the layers that look back only so far: shorter than the sequences of `pairs`
WIDE = SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128}
GPT2 = GPT | {"n_layer": 2}
MIXED = WIDE | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
QWEN = WIDE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES = {  # model type -> settings; every one that attends causally and can share prompts, see prefix.FAMILIES
    "cohere": WIDE | {"logit_scale": 0.3},
    "cohere2": MIXED | {"logit_scale": 0.3},
    "exaone4": MIXED,
    "gemma": WIDE,
    "gemma2": MIXED | {"final_logit_softcapping": 2.0},
    "gemma3_text": MIXED,
    "glm": WIDE,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": SHAPE | {"num_hidden_layers": 2, "max_position_embeddings": 128},
    "gpt_oss": MIXED | EXPERTS,
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": WIDE | {"logits_scaling": 3.0},
    "llama": WIDE | {"tie_word_embeddings": True},  # as SmolLM: tied, grouped queries
    "ministral": MIXED,
    "mistral": WIDE | {"sliding_window": WINDOW},
    "mixtral": WIDE | EXPERTS | {"sliding_window": WINDOW},
    "olmo2": WIDE,
    "olmo3": MIXED,
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "init_std": 0.3}
    | {"num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1},
    "phi": WIDE,
    "phi3": WIDE | {"sliding_window": WINDOW},
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3_moe": QWEN | EXPERTS,
    "smollm3": MIXED | {"use_sliding_window": True},
    "stablelm": WIDE,
    "starcoder2": WIDE | {"sliding_window": WINDOW},
}
ODD = {  # their attention or recurrence counts places, so prompts cannot be shared
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
    "falcon": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "alibi": True,
    },
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.3, "intermediate_size": 32}
    | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": 128},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "initializer_range": 0.3},
}


def family(name: str, seed: int = 0, vocab: int = VOCAB, **settings):
    """A two-layer model of one of the families above, with short windows where its family has windows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, vocab_size=vocab, **(FAMILIES | ODD).get(name, {}) | settings)
    return AutoModelForCausalLM.from_config(config).eval()


TEXT = [
    "a good film and a fine cast",
    "a bad film with a poor plot",
    "good fun",
    "the plot is bad",
    "fine, really fine",
] * 4


def tokenizer(folder: Path):
    """A byte-level BPE tokenizer of 300 tokens, saved in `folder`."""
    from tpo_data.pocket import train_tokenizer

    return train_tokenizer(TEXT, 300, folder)


FORMS = ("byte", "prefix", "llama2", "always", "first", "unigram", "wordpiece")
SPECIAL = ["<unk>", "<s>", "</s>"]


@functools.cache
def tokenizer_of(form: str):
    """A tiny tokenizer with <s> before every text, of one of the FORMS that people's models have.

    "byte" and "prefix" are byte-level BPE, without and with add_prefix_space; "llama2" is sentencepiece as the normalizers
    Prepend and Replace, "always", "first" and "unigram" as a Metaspace.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = {"unigram": models.Unigram(), "wordpiece": models.WordPiece(unk_token="<unk>")}
    backend = Tokenizer(model.get(form, models.BPE(unk_token=None if form in ("byte", "prefix") else "<unk>")))
    alphabet = sorted({*"".join(TEXT), *"</s>:.▁"})
    if form in ("byte", "prefix"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=form == "prefix")
        backend.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    elif form == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif form == "wordpiece":
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
    else:
        scheme = "first" if form == "first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = {"unigram": trainers.UnigramTrainer, "wordpiece": trainers.WordPieceTrainer}.get(
        form, trainers.BpeTrainer
    )
    settings = {"unk_token": "<unk>"} if form == "unigram" else {}
    settings |= {"initial_alphabet": alphabet, "special_tokens": SPECIAL, "show_progress": False}
    backend.train_from_iterator(TEXT, trainer(vocab_size=320, **settings))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


EOS = "<|end|>"
LETTERS = [EOS, *"abcdefgh", "Ġ", ".", "Ċ", "ab", "cd", "Ġa"]  # "ab" also as "a", "b": not every sample tokenizes back


def letters():
    """A tokenizer of LETTERS, whose texts EOS begins and ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(LETTERS)}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("c", "d"), ("Ġ", "a")]))
    backend.add_special_tokens([EOS])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def checkpoint_folder(folder: Path, build=llama) -> Path:
    """A causal model and its tokenizer, saved as the hub has them."""
    tokenizer(folder)
    build(vocab=300).save_pretrained(str(folder))
    return folder


CLASSIFIERS = {  # the smallest of each kind; RoBERTa's positions begin after its padding index
    "DistilBert": {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64},
    "Roberta": {k: v for k, v in SHAPE.items() if k.startswith(("hidden", "inter", "num_hidden", "num_att"))}
    | {"max_position_embeddings": 66, "pad_token_id": 1},
    "GPT2": {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "Llama": {k: v for k, v in SHAPE.items() if not k.endswith("token_id")} | {"max_position_embeddings": 64},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
}


def classifier(folder: Path, labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE"), kind="DistilBert", **settings) -> Path:
    """A tiny sentiment classifier, saved as the hub has them."""
    import transformers

    torch.manual_seed(0)
    tokenizer(folder)
    labels = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    settings = {"vocab_size": 300, "initializer_range": 0.5, **labels, **CLASSIFIERS[kind], **settings}
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(str(folder))
    return folder


def pairs(count: int, seed: int = 0, longest: int = 12, vocab: int = VOCAB) -> list[EncodedPair]:
    """Random pairs with ragged lengths; no two responses are alike."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, longest, (1,), generator=draw))
        return torch.randint(1, vocab, (length,), generator=draw).tolist()

    return [
        EncodedPair(row=row, prompt_ids=[0, *ids(1)], chosen_ids=ids(2), rejected_ids=ids(2)) for row in range(count)
    ]


def of_prompts(prompts: int, completions: int = 4, **settings) -> list[EncodedPair]:
    """All pairs among the completions of each of some prompts, as sampling gives them: of four, six."""
    made = []
    for first in pairs(prompts, **settings):
        several = [each.chosen_ids for each in pairs(completions, seed=len(made) + 1, **settings)]
        for i, chosen in enumerate(several):
            made += [
                EncodedPair(len(made) + k, first.prompt_ids, chosen, other) for k, other in enumerate(several[i + 1 :])
            ]
    return made
