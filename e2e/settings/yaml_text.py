"""YAML of bounded size."""

from __future__ import annotations

from typing import Any

import yaml

MAX_NODES = 100_000
"""Most values of a YAML text, each alias counted as all that it stands for."""
MAX_DEPTH = 50
"""Most levels of a YAML text."""


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars stay the text that was typed, or null; the setting's type interprets it.

    Plain YAML would read the folder 2024_01 as 202401, and the class yes as true.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (YAML's own name)
        first: [(tag, pattern) for tag, pattern in pairs if tag == "tag:yaml.org,2002:null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that occurs twice, as the YAML standard demands and PyYAML does not."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = [key for number, key in enumerate(keys) if key in keys[:number]]
        if duplicates:
            raise yaml.constructor.ConstructorError(None, None, f"found '{duplicates[0]}' twice")
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, *, typed: bool = False) -> Any:
    """Return the content of a YAML text.

    Parameters
    ----------
    text : str
        The YAML.
    typed : bool
        Whether numbers and booleans are read as such; if not, all scalars are the text that was typed.

    Raises
    ------
    yaml.YAMLError
        It is no YAML, is nested too deeply, or its aliases stand for too many values.
    """
    loader = (yaml.SafeLoader if typed else _TextLoader)(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count_nodes(root, {}, MAX_DEPTH)
        return loader.construct_document(root)
    except RecursionError as error:
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the number of values that a node stands for, with its aliases written out."""
    if depth == 0:
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
    if id(node) not in counts:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counts[id(node)] = 1 + sum(_count_nodes(child, counts, depth - 1) for child in children)
        if counts[id(node)] > MAX_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES:,} values")
    return counts[id(node)]
