"""COCO folders as data sets: where files are looked for, what is held out, digests."""

import json

import numpy as np
import pytest

from paramshare.data import ArraySource, DataError, Dataset, eval_batches, reading


def assert_same(one, other) -> None:
    assert len(one) == len(other)
    for a, b in ((one[i], other[i]) for i in range(len(one))):
        np.testing.assert_array_equal(a["input"], b["input"])
        assert a["label"].keys() == b["label"].keys()
        for name in a["label"]:
            np.testing.assert_array_equal(a["label"][name], b["label"][name])
            assert np.asarray(a["label"][name]).dtype == np.asarray(b["label"][name]).dtype


@pytest.mark.parametrize("task", ["detection", "pose"])
def test_sources_in_memory_and_on_disk_are_equal(coco, tmp_path, monkeypatch, task):
    coco.make(tmp_path, train=coco.people(8), test=coco.people(2))
    options = {"task": task, "validation": 0.25, "train_examples": 5}
    memory = coco.load(tmp_path, seed=3, **options)
    assert isinstance(memory.train, ArraySource) and memory.in_memory
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    disk = coco.load(tmp_path, seed=3, **options)
    assert not disk.in_memory
    assert (memory.task, memory.mean, memory.std) == (disk.task, disk.mean, disk.std)
    # A picture of one person is shown as people are cropped: with a margin of an eighth of it.
    picture = np.zeros((40, 24, 3), np.uint8)
    for data in (memory, disk):
        view = data.view(picture)
        assert view.scale[1] == pytest.approx(16 / 50 if task == "pose" else 16 / 40)
    assert memory.input_shape == disk.input_shape == memory.train[0]["input"].shape
    for name in ("train", "validation", "test"):
        assert_same(getattr(memory, name), getattr(disk, name))
    batches = list(eval_batches(disk.test, 3))
    assert sum(int(batch["weight"].sum()) for batch in batches) == len(disk.test)
    disk.task.check_labels(batches[0]["label"], disk.input_shape)


def shown(source) -> list[float]:
    boxes = [source[i]["label"]["box"] for i in range(len(source))]
    return sorted(round(float(box[0, 0]), 3) for box in boxes)


def test_the_held_out_part_depends_on_the_seed_alone(coco, folder):
    one, same, other = (coco.load(folder, seed, validation=0.4) for seed in (1, 1, 2))
    assert_same(one.validation, same.validation)
    assert (len(one.train), len(one.validation), len(one.test)) == (6, 4, 3)
    assert shown(one.validation) != shown(other.validation)
    whole = coco.load(folder, validation=0)
    assert sorted(shown(one.train) + shown(one.validation)) == shown(whole.train)
    fewer = coco.load(folder, 1, validation=0.4, train_examples=2)
    assert_same(one.validation, fewer.validation)
    assert len(fewer.train) == 2 and set(shown(fewer.train)) < set(shown(one.train))
    with pytest.raises(DataError, match="train_examples is 7; it must be from 1 to 6"):
        coco.load(folder, validation=0.4, train_examples=7)


def test_people_of_an_image_are_held_out_together(coco, tmp_path):
    coco.make(tmp_path, train=coco.people(8), test=coco.people(1))
    data = coco.load(tmp_path, task="pose", validation=0.5)
    one, other = (
        {int(x["label"]["image"]) for x in coco.examples(source)}
        for source in (data.train, data.validation)
    )
    assert len(data.train) == len(data.validation) == 8 and not one & other


def test_the_digest_follows_the_files(coco, folder, monkeypatch):
    for limit in (reading.MEMORY_LIMIT, 0):
        monkeypatch.setattr(reading, "MEMORY_LIMIT", limit)
        before = coco.load(folder).digest
        assert coco.load(folder).digest == before
        coco.paint(folder / "train" / "3.png", (40, 20), [limit > 0, 0, 9, 9], colour=coco.BLUE)
        image = coco.load(folder).digest
        data = json.loads((folder / "train.json").read_text())
        data["annotations"][4]["bbox"][3] += 1
        coco.write(folder / "train.json", data)
        assert len({before, image, coco.load(folder).digest}) == 3


def test_the_fingerprint_covers_all_files_of_a_set_on_disk(coco, tmp_path, monkeypatch):
    """The digest reads only 16 examples of a set outside memory, not the second of 40."""
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    folder = coco.make(tmp_path, train=coco.part(40, size=(60, 20)), test=coco.part(1))
    digests = [coco.load(folder, validation=0).digest]
    coco.paint(folder / "train" / "1.png", (60, 20), *([i, i, 1, 1] for i in range(20)))
    digests.append(coco.load(folder, validation=0).digest)
    data = coco.part(40, size=(60, 20))
    data["annotations"][1]["bbox"] = [1, 1, 1, 1]
    coco.write(folder / "train.json", data)
    digests.append(coco.load(folder, validation=0).digest)
    assert len(set(digests)) == 3 and coco.load(folder, validation=0).digest == digests[2]


def test_a_test_set_without_boxes_is_a_warning(coco, tmp_path, capsys):
    data = coco.part(2)
    data["annotations"][0]["iscrowd"] = 1
    del data["annotations"][1]
    coco.load(coco.make(tmp_path, train=coco.part(4), test=data))
    assert "test.json: there is no box that is not a crowd's; its measures will be NaN" in (
        capsys.readouterr().err
    )


def test_images_without_any_annotation_are_a_set(coco, tmp_path):
    coco.make(tmp_path, train={**coco.part(3), "annotations": []}, test=coco.part(1))
    train = coco.load(tmp_path, validation=0).train
    assert len(train) == 3
    assert not any(example["label"]["present"].any() for example in coco.examples(train))


def parts(data: Dataset):
    return data.train, data.validation, data.test


def test_usual_names_and_folders(coco, tmp_path):
    train, val, test = coco.part(4), coco.part(2), coco.part(1)
    coco.make(tmp_path / "a", train=train, val=val)  # no test: val is the test part
    assert [len(x) for x in parts(coco.load(tmp_path / "a", validation=0.25))] == [3, 1, 2]
    coco.make(tmp_path / "b", train=train, val=val, test=test)
    assert [len(x) for x in parts(coco.load(tmp_path / "b"))] == [4, 2, 1]
    assert [len(x) for x in parts(coco.load(tmp_path / "b", validation=0))] == [4, 0, 1]
    assert [len(x) for x in parts(coco.load(tmp_path / "b", test="val.json"))] == [3, 1, 2]

    named = {"train": "train.json", "validation_set": "val.json"}
    assert [len(x) for x in parts(coco.load(tmp_path / "a", validation=0.25, **named))] == [3, 1, 2]
    assert [len(x) for x in parts(coco.load(tmp_path / "b", test="val.json", **named))] == [3, 1, 2]

    root = coco.make(tmp_path / "c", train2017=train, val2017=val)  # as COCO is unpacked
    for name in ("train2017", "val2017"):
        target = root / "annotations" / f"instances_{name}.json"
        target.parent.mkdir(exist_ok=True)
        (root / f"{name}.json").rename(target)
    assert [len(x) for x in parts(coco.load(root, validation=0))] == [4, 0, 2]
    with pytest.raises(DataError, match=r"no annotation file for train \(train.json, person_key"):
        coco.load(root, task="pose")

    (root / "train2017").rename(root / "images")  # one folder for all images
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(
        DataError, match=r"instances_val2017.json: the image .* none of the folders"
    ):
        (root / "images" / "1.png").rename(root / "images" / "7.png")
        coco.load(root, train="annotations/instances_val2017.json", validation=0)
    other = "annotations/instances_val2017.json"
    data = coco.load(root, train=other, test=other, images="elsewhere", validation=0)
    assert [len(x) for x in parts(data)] == [2, 0, 2]
