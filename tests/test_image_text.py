"""Images as inputs, and objectives over them: what is decoded, what is refused first, and scores worked out by hand."""

import copy
import gzip
import io
import json
import math
import struct
import sys
import zlib

import pytest
import torch
from conftest import WORDS, stack_adapters
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_bases import picture, save_tiny

from lorag.base.base_model import BaseModel, kind_of
from lorag.base.layout import LoraLayout
from lorag.base.objectives import make_objective
from lorag.base.objectives.image_text import recall
from lorag.base.objectives.image_to_text import box_f1, boxes_of
from lorag.base.row_adapters import RowAdapters
from lorag.errors import ArtifactError, ConfigError, MissingDependencyError, TaskError
from lorag.files.images import ImageFile
from lorag.tasks.suite import Example, Task, TaskSuite

BOX = "<loc_{}><loc_{}><loc_{}><loc_{}>"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Two tasks of images: which colour they have, in words that are a caption or a label with a box."""
    folder = tmp_path_factory.mktemp("images")
    tasks = []
    for number, (name, colours) in enumerate({"warm": ["red", "green"], "cold": ["blue", "green"]}.items()):
        rows = []
        for place in range(8):
            colour, path = colours[place % 2], f"{name}/{place}.{'png' if place % 2 else 'jpg'}"
            (folder / name).mkdir(exist_ok=True)
            (folder / path).write_bytes(picture(colour, 10 * number + place, "PNG" if place % 2 else "JPEG"))
            text = f"the {colour} {WORDS[5 + place]}"
            rows.append(Example(ImageFile(path, folder), text, "train" if place < 5 else "test"))
        tasks.append(Task(name, "demo", (f"tell {name} pictures",), None, "MIT", "made", tuple(rows), "image"))
    TaskSuite(tasks).save(folder)
    return TaskSuite.from_folder(folder), folder


@pytest.fixture(scope="module", params=["clip", "florence2"])
def seeing(request, tmp_path_factory, random_adapter):
    """Each kind of base that sees: its objective, with three adapters over modules that images pass."""
    base = BaseModel(str(save_tiny(request.param, tmp_path_factory.mktemp(request.param))), kind_of_name := KINDS[request.param])
    assert kind_of(base.name) == kind_of_name
    model = base.load("cpu")
    targets = r"vision_model\..*\.(q|k|v)_proj" if request.param == "clip" else ["q_proj", "fc2", "lm_head", "qkv"]
    layout = LoraLayout.from_model(model, targets)
    objective = make_objective(OBJECTIVE[request.param], base.tokenizer(), {"max_length": 8})
    return objective, RowAdapters(model, layout), [random_adapter(layout, rank=2, seed=seed) for seed in range(3)]


KINDS = {"clip": "two_towers", "florence2": "image_seq2seq"}
OBJECTIVE = {"clip": "image_text", "florence2": "image_seq2seq"}

# --- images of a suite --------------------------------------------------------------------------------------------------


def test_a_suite_of_images_is_read_copied_and_compared(suite, tmp_path):
    """Wherever it lies: same tasks, same fingerprint, same bytes; images go along, and deep copies still open."""
    read, folder = suite
    again = TaskSuite.from_folder(read.save(tmp_path / "elsewhere"))
    assert again.tasks == read.tasks and again.fingerprint() == read.fingerprint()
    for name in ("tasks.jsonl", "examples.jsonl.gz", "warm/0.jpg"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (folder / name).read_bytes()
    image = copy.deepcopy(again["warm"]).examples[1].input
    assert image.open().size == (24, 18) and image.open().mode == "RGB" and str(image) == "warm/1.png"


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(side):
    """A PNG of a few hundred bytes that stands for side x side pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


def _gif():
    raw = io.BytesIO()
    Image.new("RGB", (4, 4)).save(raw, "GIF")
    return raw.getvalue()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (_bomb(8_000), "8000 x 8000"),
        (_bomb(60_000), "image"),
        (_gif(), "PNG or JPEG"),
        (b"\x80\x04\x95 a pickle", "pickle"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG or JPEG"),
        (b"", "empty"),
        (picture("red", 0)[:150], "decoded"),
        (picture("red", 0, "JPEG")[:200], "decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "decoded"),
        (b"\xff\xd8\xff\xe0" + b"\xff" * 50, "decoded"),
    ],
)
def test_what_is_no_sound_image_is_refused(tmp_path, raw, named):
    """Judged by content under an honest name; a decompression bomb by its header, before a pixel is decoded."""
    (tmp_path / "a.png").write_bytes(raw)
    with pytest.raises(ArtifactError, match=named):
        ImageFile("a.png", tmp_path).open()


@pytest.mark.slow
@given(st.binary(max_size=300), st.integers(0, 400))
def test_damage_is_an_error_of_ours(tmp_path_factory, noise, place):
    """Whatever overwrites part of an image: it opens, or ArtifactError says why."""
    raw = bytearray(picture("blue", 1))
    raw[place : place + len(noise)] = noise
    folder = tmp_path_factory.getbasetemp()
    (folder / "damaged.png").write_bytes(raw)
    try:
        assert ImageFile("damaged.png", folder).open().mode == "RGB"
    except ArtifactError:
        pass


def test_files_too_large_are_not_read(tmp_path):
    """The limit on bytes holds before the file is read."""
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(33 * 2**20)
    with pytest.raises(ArtifactError, match="too large"):
        ImageFile("a.png", tmp_path).open()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "none.png", "a\\b.png", "link.png", "", "folder"])
def test_paths_stay_inside_the_suite(suite, tmp_path, path):
    """An example can name no file outside of the suite's folder, nor through a link: the suite is refused, naming the line."""
    read, _ = suite
    folder = TaskSuite([read["warm"]]).save(tmp_path / "suite")
    (tmp_path / "a.png").write_bytes(picture("red", 0))
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    (folder / "folder").mkdir()
    row = json.dumps({"task": "warm", "split": "train", "input": path, "output": "red"})
    (folder / "examples.jsonl.gz").write_bytes(gzip.compress(f"{row}\n".encode()))
    with pytest.raises(TaskError, match="line 1: field 'input'"):
        TaskSuite.from_folder(folder)


def test_images_need_the_extra_and_a_base_that_sees(suite, monkeypatch, tokenizer):
    """Without Pillow the extra is named; a text base, or a text as an input, is refused in words."""
    read, _ = suite
    with pytest.raises(ConfigError, match="sees images"):
        make_objective("image_text", tokenizer)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"lorag\[vision\]"):
        read["warm"].examples[0].input.open()


# --- both objectives ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_s_loss_does_not_depend_on_the_others(suite, seeing):
    """Tasks together, each with its own adapter, lose and score what they do alone."""
    objective, rows, adapters = seeing
    tasks, stacked = [*suite[0]], stack_adapters(adapters[:2])
    with torch.no_grad(), rows.use(stacked) as model:
        together = objective.losses(model, objective.sample(tasks, 3, "0"))
    scores = objective.scores(rows, stacked, tasks, limit=3)
    for index, task in enumerate(tasks):
        own = stack_adapters([adapters[index]])
        with torch.no_grad(), rows.use(own) as model:
            alone = objective.losses(model, objective.sample([task], 3, "0"))
        assert torch.allclose(together[index], alone[0], atol=1e-4)
        (score,) = objective.scores(rows, own, [task], limit=3)
        assert score == pytest.approx(scores[index], rel=1e-5, abs=1e-4)
    assert not torch.allclose(together[0], together[1]) and objective.metric in scores[0]


@pytest.mark.slow
def test_gradients_reach_the_adapters_and_training_lowers_the_loss(suite, seeing):
    """A dozen steps on one task's images: the loss falls, in every module there is a gradient."""
    objective, rows, adapters = seeing
    trained = {name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, (a, b) in stack_adapters(adapters[:1]).items()}
    optimizer = torch.optim.Adam([tensor for pair in trained.values() for tensor in pair], lr=3e-3)
    batch, losses = objective.sample([suite[0]["warm"]], 4, "0"), []
    for _ in range(12):
        with rows.use(trained) as model:
            loss = objective.losses(model, batch).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(tensor.grad.abs().max() > 0 for pair in trained.values() for tensor in pair)


def test_settings_and_task_vectors(suite, seeing):
    """An objective can be made again from its settings; images of one colour have nearer vectors than others."""
    objective, rows, _ = seeing
    reader = objective.tokenizer if objective.name == "image_text" else objective.processor
    assert make_objective(objective.name, reader, objective.settings()).settings() == objective.settings()
    vectors = objective.hidden(rows.model, [example.input for example in suite[0]["warm"].examples[:4]])
    apart = torch.cdist(vectors, vectors)
    assert apart[0, 2] < apart[0, 1] and apart[1, 3] < apart[1, 2]
    with pytest.raises(TaskError, match="not an image"):
        objective.hidden(rows.model, ["warm/0.jpg"])


# --- retrieval ----------------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    """Rows find a fitting column among the k best; a tie counts against it, and any of several fitting columns will do."""
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]])
    fits = torch.eye(3, dtype=torch.bool)
    assert recall(similarity, fits, 1) == pytest.approx(1 / 3)
    assert recall(similarity, fits, 2) == pytest.approx(2 / 3)
    assert recall(similarity, fits, 3) == 1
    fits[1, 0] = True
    assert recall(similarity, fits, 1) == pytest.approx(2 / 3)


def test_the_contrastive_loss_by_hand(suite, tmp_path):
    """Two pairs, cosines and temperature: cross-entropy in both directions; a text that fits two images is not a mistake."""
    base = BaseModel(str(save_tiny("clip", tmp_path)), "two_towers")
    model, objective = base.load("cpu"), make_objective("image_text", base.tokenizer())
    task = suite[0]["warm"]
    batch = objective.sample([task], 2, "1")
    with torch.no_grad():
        loss = objective.losses(model, batch).item()
        seen, read = model.get_image_features(pixel_values=batch.pixels).pooler_output, model.get_text_features(**batch.texts).pooler_output
        logits = torch.nn.functional.cosine_similarity(seen[:, None], read[None], dim=-1) * model.logit_scale.exp()
    right = torch.arange(2)
    expected = (torch.nn.functional.cross_entropy(logits, right) + torch.nn.functional.cross_entropy(logits.T, right)) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    same = Task("same", "demo", ("same",), None, "MIT", "made", tuple(Example(e.input, "the cat", e.split) for e in task.examples), "image")
    batch = objective.sample([same], 4, "0")
    with torch.no_grad():
        loss = objective.losses(model, batch).item()
        seen, read = model.get_image_features(pixel_values=batch.pixels).pooler_output, model.get_text_features(**batch.texts).pooler_output
        logits = torch.nn.functional.cosine_similarity(seen[:, None], read[None], dim=-1) * model.logit_scale.exp()
    # From each image all texts are alike and right; from a text all images are right, and should be alike.
    assert loss == pytest.approx((math.log(4) - logits.log_softmax(0).mean().item()) / 2, rel=1e-3)


# --- detection ----------------------------------------------------------------------------------------------------------


def test_boxes_are_read_from_location_tokens():
    """A label may stand before several boxes; corners may come in any order; text without boxes has none."""
    text = f"Cat{BOX.format(1, 2, 30, 40)}{BOX.format(50, 60, 7, 8)} red  dog {BOX.format(0, 0, 999, 999)}"
    assert boxes_of(text) == [("cat", 1, 2, 30, 40), ("cat", 7, 8, 50, 60), ("red dog", 0, 0, 999, 999)]
    assert boxes_of("a cat sat<loc_1><loc_2>") == []


def test_box_f1_by_hand():
    """Label and overlap must both be right, a box counts once, and what is missed or invented costs."""
    right, half = ("cat", 0.0, 0.0, 99.0, 99.0), ("cat", 0.0, 0.0, 99.0, 49.0)
    assert box_f1([[right]], [[right]]) == 1 and box_f1([[half]], [[right]]) == 1  # overlap 0.5
    assert box_f1([[("cat", 0.0, 0.0, 99.0, 48.0)]], [[right]]) == 0
    assert box_f1([[("dog", *right[1:])]], [[right]]) == 0
    assert box_f1([[right, right]], [[right]]) == pytest.approx(2 / 3)
    assert box_f1([[], [right]], [[right], [right]]) == pytest.approx(2 / 3)
    assert box_f1([[]], [[]]) == 1 and box_f1([[right]], [[]]) == 0


@pytest.mark.slow
def test_exact_match_is_that_of_written_answers(suite, tmp_path):
    """Florence-2's begin token is given, not guessed: teacher forcing and greedy decoding agree on every answer."""
    base = BaseModel(str(save_tiny("florence2", tmp_path)), "image_seq2seq")
    model = base.load("cpu")
    objective = make_objective("image_seq2seq", base.tokenizer(), {"boxes": True, "max_length": 6})
    inputs = [example.input for example in suite[0]["cold"].examples[:3]]
    written = objective.generate(model, inputs)
    rows = RowAdapters(model, LoraLayout.from_model(model, ["q_proj"]))

    def score(answers):
        examples = tuple(Example(image, answer, "test") for image, answer in zip(inputs, answers, strict=True))
        return objective.scores(rows, None, [Task("t", "demo", ("t",), None, "MIT", "made", examples, "image")], limit=9)[0]

    batch = objective.encode([[(image, answer) for image, answer in zip(inputs, written, strict=True)]])
    with torch.no_grad():
        guessed = objective._logits(model, batch).argmax(-1)
    text = batch.targets >= 4  # the end is not written where the limit comes first
    assert text.any() and (guessed[text] == batch.targets[text]).all()
    assert score(written)["token_accuracy"] > score(["the cat"] * 3)["token_accuracy"]
    assert score(written)["box_f1"] == 1
