"""What the pictures of diagrams share."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save(ax: Axes, picture: Path) -> None:
    """Writes the picture that an axis fills, without what changes between runs, and says where."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    ax.axis("off")
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.99)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, facecolor="white", metadata={"Software": None})
    print(picture)
