"""An accuracy says which images it is of."""

import shutil

import pytest
from launching import write_image_folder, write_network

from launch import evaluate


def test_what_an_exclude_list_takes_out_and_what_it_names_in_vain_is_said(tmp_path, capsys):
    write_network(tmp_path / "net.pt", num_classes=3)
    images = write_image_folder(tmp_path / "images")
    (images / "exclude.txt").write_text("val/class0/0.jpg\nval/class0/no.jpg\n")
    arguments = [str(tmp_path / "net.pt"), "--data", str(images), "--batch-size", "6"]
    with pytest.warns(UserWarning) as warned:
        assert evaluate.main(arguments) == 0
    messages = [str(warning.message) for warning in warned]
    assert any("1 validation images are excluded and not counted" in message for message in messages)
    assert any("names what is not in the data set" in m and m.endswith("val/class0/no.jpg") for m in messages)
    assert "17 images" in capsys.readouterr().out


def test_images_to_evaluate_on_need_no_training_set_beside_them(tmp_path, capsys):
    write_network(tmp_path / "net.pt", num_classes=3)
    images = write_image_folder(tmp_path / "images")
    shutil.rmtree(images / "train")
    arguments = [str(tmp_path / "net.pt"), "--data", str(images), "--batch-size"]
    assert evaluate.main([*arguments, "64"]) == 0
    assert "18 images" in capsys.readouterr().out
    assert evaluate.main([*arguments, "0"]) == 2
    assert "--batch-size: found '0', allowed: a whole number from 1" in capsys.readouterr().err
