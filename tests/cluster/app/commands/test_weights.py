"""`vdg fetch-weights`: what a config names, by field."""

from tests.cluster.app.test_cli import fail, invoke


def test_installed_weights_are_found_and_missing_ones_named() -> None:
    shown = invoke("fetch-weights", "grocery")
    assert "here: embed.towers.photo.weights: " in shown
    assert "here: vdg.language_model: " in shown
    missing = ["--set", "vdg.language_model.package=no_such_package"]
    assert "'no_such_package' is not installed" in fail("fetch-weights", "grocery", *missing)
