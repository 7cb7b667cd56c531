"""The benchmark that needs a GPU runs on tiny shapes without one."""

import bench_gpu
import pytest


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("section", bench_gpu.SECTIONS)
def test_each_section_prints_its_figures(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that moved is found before a GPU is paid for."""
    bench_gpu.SECTIONS[section]()
    assert f"{section}: " in capsys.readouterr().out
