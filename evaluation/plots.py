"""Pictures: the one place that imports matplotlib."""
import base64
import io


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def picture(figure):
    """A figure as an <img> that carries its own bytes."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)
    return base64.b64encode(data.getvalue()).decode()
