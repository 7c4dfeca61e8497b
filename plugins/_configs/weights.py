"""Settings that name weights."""

from sandbox.contracts import is_path


def local_weights(weights: str | None, keyword: str) -> dict[str, str | None]:
    """`PluginConfig.files` for `weights`: empty for null, `keyword` and a name on the hub."""
    if weights is None or weights == keyword or not is_path(weights):
        return {}
    return {"weights": weights}
