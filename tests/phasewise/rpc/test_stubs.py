"""The committed stubs are those of the committed .proto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc import phasewise_pb2_grpc

REPOSITORY = Path(__file__).parents[3]
PROTO = "phasewise/rpc/phasewise.proto"


def compiled(tmp_path: Path) -> descriptor_pb2.FileDescriptorProto:
    """The .proto as the installed compiler sees it, without the JSON names that it adds and stubs do not carry."""
    output = tmp_path / "set.pb"
    include = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(["protoc", f"-I{REPOSITORY}", f"-I{include}", f"--descriptor_set_out={output}", PROTO])
    assert code == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    for message in file.message_type:
        for part in (message, *message.nested_type):
            for field in part.field:
                field.ClearField("json_name")
    return file


def test_messages_are_current(tmp_path: Path) -> None:
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert committed == compiled(tmp_path), "run `make proto`"


class RecordingChannel:
    """Takes the place of a channel and notes what a stub asks of it."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[bool, Any, Any]] = {}

    def unary_unary(self, path: str, *, request_serializer: Any, response_deserializer: Any, **_: Any) -> None:
        self.calls[path] = (False, request_serializer, response_deserializer)

    def unary_stream(self, path: str, *, request_serializer: Any, response_deserializer: Any, **_: Any) -> None:
        self.calls[path] = (True, request_serializer, response_deserializer)


def test_stubs_know_every_method_with_its_kind_and_types(tmp_path: Path) -> None:
    (service,) = compiled(tmp_path).service
    channel = RecordingChannel()
    phasewise_pb2_grpc.InferenceStub(channel)
    assert set(channel.calls) == {f"/phasewise.v1.Inference/{method.name}" for method in service.method}
    for method in service.method:
        streams, serialize, deserialize = channel.calls[f"/phasewise.v1.Inference/{method.name}"]
        request = getattr(pb, method.input_type.rpartition(".")[2])
        response = getattr(pb, method.output_type.rpartition(".")[2])
        assert streams == method.server_streaming and not method.client_streaming
        assert serialize == request.SerializeToString
        assert isinstance(deserialize(response().SerializeToString()), response)
        assert callable(getattr(phasewise_pb2_grpc.InferenceServicer, method.name))


def test_stubs_were_made_by_the_oldest_generator_that_we_support() -> None:
    messages = (REPOSITORY / "phasewise/rpc/phasewise_pb2.py").read_text()
    services = (REPOSITORY / "phasewise/rpc/phasewise_pb2_grpc.py").read_text()
    assert "# Protobuf Python Version: 6.31.1\n" in messages, "run `make proto`"
    assert "GRPC_GENERATED_VERSION = '1.76.0'\n" in services, "run `make proto`"
    assert "from phasewise.rpc import phasewise_pb2" in services
