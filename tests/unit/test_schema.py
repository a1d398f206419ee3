"""The committed descriptors are what the protos say."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vllm_companion_plugin.wire import messages, schema

ROOT = Path(__file__).resolve().parents[2]


def _make_stubs() -> ModuleType:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("make_stubs", ROOT / "tools" / "make_stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_descriptors_in_the_tree_are_those_of_the_protos() -> None:
    from google.protobuf import descriptor_pb2

    committed = (ROOT / "vllm_companion_plugin" / "wire" / "schema.binpb").read_bytes()
    # Compared parsed: compilers of different versions may order bytes differently.
    parse = descriptor_pb2.FileDescriptorSet.FromString
    assert parse(committed) == parse(_make_stubs().descriptor_set())


def test_the_message_list_in_the_tree_is_that_of_the_protos() -> None:
    committed = (ROOT / "vllm_companion_plugin" / "wire" / "messages.py").read_text()
    assert committed == _make_stubs().messages_module()


def test_the_types_in_the_tree_are_those_of_the_protos() -> None:
    """Compilers of different versions write different imports, and the same classes."""
    committed = (ROOT / "vllm_companion_plugin" / "wire" / "messages.pyi").read_text()
    assert classes_of(committed) == classes_of(_make_stubs().messages_types())


def classes_of(stub: str) -> dict[str, str]:
    return {node.name: ast.dump(node) for node in ast.parse(stub).body if isinstance(node, ast.ClassDef)}


def test_messages_are_not_registered_in_the_pool_that_all_libraries_share() -> None:
    from google.protobuf import descriptor_pool

    assert messages.EntryKey.DESCRIPTOR.full_name == "vllm_companion.v1.EntryKey"
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("vllm_companion.v1.EntryKey")


def test_every_method_of_the_service_has_a_callable_of_its_kind() -> None:
    made: dict[str, str] = {}

    class Channel:
        def __getattr__(self, kind: str) -> object:
            return lambda path, **_: made.setdefault(path, kind)

    schema.Stub(Channel())
    assert made == {
        "/vllm_companion.v1.Companion/Attach": "unary_stream",
        "/vllm_companion.v1.Companion/Publish": "stream_unary",
        "/vllm_companion.v1.Companion/Sleep": "unary_unary",
        "/vllm_companion.v1.Companion/Stage": "unary_unary",
        "/vllm_companion.v1.Companion/CommitStaged": "unary_unary",
        "/vllm_companion.v1.Companion/GetGeneration": "unary_unary",
        "/vllm_companion.v1.Companion/Advance": "unary_unary",
        "/vllm_companion.v1.Companion/MakeCurrent": "unary_unary",
        "/vllm_companion.v1.Companion/Status": "unary_unary",
        "/vllm_companion.v1.Companion/Watch": "unary_stream",
        "/vllm_companion.v1.Companion/Unload": "unary_unary",
        "/vllm_companion.v1.Companion/MakeRoom": "unary_unary",
        "/vllm_companion.v1.Companion/Shutdown": "unary_unary",
        "/vllm_companion.v1.Companion/Report": "unary_unary",
        "/vllm_companion.v1.Companion/Metrics": "unary_unary",
    }
