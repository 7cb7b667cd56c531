import torch

from mining.colours import BINS, WIDTH, _lab, colour_histogram


def of(*colours: tuple[int, int, int]) -> torch.Tensor:
    """Pictures [n, 8, 8, 3] of one colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, 8, 8, -1).clone()


def test_a_picture_of_one_colour_fills_the_bin_of_its_lab_values() -> None:
    named = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 30, 40), (40, 60, 200)]
    found = colour_histogram(of(*named))
    assert found.shape == (5, WIDTH)
    lightness, a, b = (torch.tensor(values) for values in ([0, 4, 2, 2, 1], [3, 3, 3, 6, 6], [3, 3, 3, 5, 0]))
    expected = (lightness * BINS[1] + a) * BINS[2] + b
    assert found.argmax(1).tolist() == expected.tolist()
    torch.testing.assert_close(found.amax(1), torch.ones(5))


def test_only_the_middle_counts_and_norms_are_1() -> None:
    framed = of((255, 255, 255))
    framed[:, 2:6, 2:6] = of((200, 30, 40))[:, 2:6, 2:6]
    torch.testing.assert_close(colour_histogram(framed), colour_histogram(of((200, 30, 40))))
    noise = torch.randint(256, (3, 20, 30, 3), dtype=torch.uint8)
    torch.testing.assert_close(colour_histogram(noise).norm(dim=1), torch.ones(3))


def test_half_of_each_colour_is_alike_by_the_root_of_a_half() -> None:
    mixed = of((0, 0, 0))
    mixed[:, :, 4:] = 255
    torch.testing.assert_close((colour_histogram(mixed) @ colour_histogram(of((0, 0, 0))).T).item(), 0.5**0.5)


def test_lab_values_are_the_known_ones() -> None:
    rgb = torch.tensor([(255, 0, 0), (0, 0, 255), (0, 255, 0), (128, 128, 128)]) / 255
    known = [(53.24, 80.09, 67.20), (32.30, 79.19, -107.86), (87.73, -86.18, 83.18), (53.59, 0.0, 0.0)]
    torch.testing.assert_close(_lab(rgb), torch.tensor(known), atol=0.1, rtol=0)
