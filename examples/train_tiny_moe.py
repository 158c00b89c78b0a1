"""Train the tiny Mixture-of-Experts model that ships with GloBE.

A Qwen3-MoE of about five million parameters is trained from scratch on the documentation of the
Python standard library: the topics of `pydoc` and the docstrings of every stdlib module. One
document in twenty is held out; a document is a whole module or topic, so no module is on both sides.

    python examples/train_tiny_moe.py --out examples/tiny_moe

Prints the held-out perplexity beside a unigram model's and writes both to `training.json`. Another size or
architecture: `--architecture olmoe --layers 4 --experts 32 --hidden 160 --intermediate 96`.
"""

import argparse
import ast
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
SEQUENCE = 256
# The training texts are paragraphs of this form: a name, a colon, a text.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- message.role + ": " + message.content + "\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "assistant:" }}
{%- endif %}
"""


def stdlib_documents() -> dict[str, str]:
    """Every documentation text of the standard library, by name; a text that repeats is kept once."""
    from pydoc_data import topics

    documents = {f"topic:{name}": text for name, text in sorted(topics.topics.items())}
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip"}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        texts = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and text not in seen:
                    seen.add(text)
                    title = getattr(node, "name", ".".join(relative.with_suffix("").parts))
                    texts.append(f"{title}: {text}")
        if texts:
            documents[f"module:{relative}"] = "\n\n".join(texts)
    for name in sorted(sys.builtin_module_names):
        module = __import__(name)
        texts = []
        for attribute in sorted(vars(module)):
            value = vars(module)[attribute]
            members = [value, *vars(value).values()] if isinstance(value, type) else [value]
            for member in members:
                text = getattr(member, "__doc__", None)
                if isinstance(text, str) and len(text) > 40 and text not in seen:
                    seen.add(text)
                    texts.append(f"{getattr(member, '__name__', attribute)}: {text}")
        if texts:
            documents[f"builtin:{name}"] = "\n\n".join(texts)
    return documents


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )


def model_config(args):
    """The transformers configuration; heads of 32, and two key-value heads where they divide."""
    own = {
        "qwen3_moe": {
            "moe_intermediate_size": args.intermediate,
            "intermediate_size": 256,
            "head_dim": 32,
            "decoder_sparse_step": 1,
        },
        "olmoe": {"intermediate_size": args.intermediate},
        "glm4_moe": {
            "moe_intermediate_size": args.intermediate,
            "intermediate_size": 256,
            "head_dim": 32,
            "n_routed_experts": args.experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
        },
    }
    heads = args.hidden // 32
    return AutoConfig.for_model(
        args.architecture,
        **own[args.architecture],
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, 2),
        num_experts=args.experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of the add-one unigram model of the training tokens on the held-out tokens."""
    counts = Counter(train.tolist())
    total = len(train) + vocab_size
    loss = sum(-math.log((counts[token] + 1) / total) for token in held_out.tolist())
    return math.exp(loss / len(held_out))


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    model.eval()
    rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    total = 0.0
    for batch in rows.split(32):
        logits = model(batch, output_router_logits=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(total / (rows.shape[0] * (SEQUENCE - 1)))


def train(model: Any, tokens: torch.Tensor, held_out: torch.Tensor, args) -> dict:
    """AdamW with a linear warm-up and a cosine to zero; keeps the best held-out state."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))),
    )
    generator = torch.Generator().manual_seed(args.seed)
    best, best_state, started = math.inf, {}, time.perf_counter()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(tokens) - SEQUENCE, (args.batch,), generator=generator)
        batch = torch.stack([tokens[s : s + SEQUENCE] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % args.evaluate_every == 0 or step == args.steps:
            value = perplexity(model, held_out)
            print(
                f"step {step} loss {loss.item():.3f} held-out perplexity {value:.2f} "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
            if value < best:
                best = value
                best_state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    return {"best_float32_perplexity": best, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", choices=["qwen3_moe", "olmoe", "glm4_moe"], default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    documents = stdlib_documents()
    train_texts = [text for name, text in documents.items() if not is_held_out(name)]
    held_out_text = EOS.join(text for name, text in documents.items() if is_held_out(name))
    tokenizer = train_tokenizer(train_texts, args.vocab)
    tokens = torch.tensor(tokenizer(EOS.join(train_texts))["input_ids"])
    held_out = torch.tensor(tokenizer(held_out_text)["input_ids"])
    unigram = unigram_perplexity(tokens, held_out, args.vocab)
    print(f"{len(tokens)} training tokens, {len(held_out)} held out, unigram perplexity {unigram:.1f}")

    model: Any = AutoModelForCausalLM.from_config(model_config(args))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    figures = train(model, tokens, held_out, args)

    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    figures |= {
        "unigram_perplexity": unigram,
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
