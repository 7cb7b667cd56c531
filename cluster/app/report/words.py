"""Numbers in words."""

from cir.config import PseudoSelection, VariantConfig


def count(value: int) -> str:
    """A whole number with thousands separated: 2,950."""
    return f"{value:,}"


SHOWN = 400  # characters of a text; a caption may be a whole file


def short(text: str) -> str:
    """A text, or its beginning and its length."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({count(len(text))} characters)"


def signed(value: float) -> str:
    """A difference with its sign and one decimal: +5.5, −0.3, 0.0."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def interval(low: float, high: float) -> str:
    """A range of differences: 3.2 to 7.7."""
    return f"{low:.1f} to {high:.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """12 s, 4 min 10 s, 1 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def selection(config: PseudoSelection) -> str:
    """Which generated triplets a model is trained on: 'the most confident 85 % of the generated ones'."""
    chosen = "the generated ones"
    if config.top_fraction is not None:
        scorers = " and ".join(scorer.replace("_", " ") for scorer in config.scorers)
        judged = "most confident" if len(config.scorers) == 1 else "best"
        chosen = f"the {judged} {100 * config.top_fraction:g} % of the generated ones"
        chosen += f" by {scorers}" if len(config.scorers) > 1 else ""
    if config.min_score is not None:
        chosen += f" that score at least {config.min_score:g}".replace("-", "−")
    if config.groups is not None:
        return f"{config.groups:,} groups of {chosen}"
    return chosen if config.ratio is None else f"{chosen}, up to {config.ratio:g} times the labelled images"


def recipe(variant: VariantConfig, labelled: int, other_labels: bool) -> str:
    """What a variant is trained on, in a line; `labelled` is the number of its labelled triplets."""
    if variant.shuffle_deltas:
        return "the semi-supervised recipe with the generated texts dealt out at random: what the pairs give without them"
    if variant.zero is not None:
        kept = "text" if variant.zero == "image" else "image"
        return f"sees the {kept} alone, the {variant.zero} is zeroed: what either half of a query gives by itself"
    if variant.pseudo_only:
        return f"{selection(variant.selection)}, without labelled ones"
    if variant.pseudo:
        return f"{count(labelled)} labelled triplets and {selection(variant.selection)}"
    if other_labels:
        return (
            f"{count(labelled)} labelled triplets of ‘{variant.triplets}’ instead: not a rival, it shows the room that is left"
        )
    return f"{count(labelled)} labelled triplets alone"
