"""A grpcio client made from the .proto files, and the standard health and reflection clients.

python grpc_client.py 127.0.0.1:50051 PROTO_DIR"""

import importlib
import sys
import tempfile

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

address, proto_dir = sys.argv[1:3]


def generated():
    """Compiles the .proto files into a temporary folder and imports the result."""
    out = tempfile.mkdtemp()
    files = [f"conclave/v1/{name}.proto" for name in ("inference", "attention", "expert")]
    assert protoc.main(["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) == 0
    sys.path.insert(0, out)
    return importlib.import_module("conclave.v1.inference_pb2"), importlib.import_module("conclave.v1.inference_pb2_grpc")


def refused(code, word, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, (error.code(), error.details())
        assert word in error.details(), (word, error.details())
        return
    raise AssertionError(f"not refused: {word}")


def main():
    pb, pb_grpc = generated()
    channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", 64 << 20)])
    api = pb_grpc.InferenceStub(channel)

    model = api.GetModel(pb.GetModelRequest())
    assert model.vocab == 4096 and model.layers == 6 and model.groups == 8 and model.has_tokenizer
    print("ok model")

    ids = api.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="Hello there"))).ids
    assert len(ids) > 1 and api.Detokenize(pb.DetokenizeRequest(ids=ids[1:])).text == "Hello there"
    print("ok tokenize")

    chat = pb.Prompt(chat=pb.Chat(messages=[pb.Message(role="user", content="What is the capital of France?")]))
    request = pb.GenerateRequest(prompt=chat, max_tokens=40, logprobs=1, sampling=pb.SamplingOptions(temperature=0))
    events = list(api.Generate(request))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished", kinds
    text = "".join(event.delta.text for event in events)
    assert "Paris" in text, text
    started, finished = events[0].started, events[-1].finished
    assert len(started.prompt_tokens) == finished.usage.prompt_tokens and finished.exact
    print("ok generate")

    scores = api.Score(pb.ScoreRequest(prompts=[pb.Prompt(text="Once upon a time")], top=2)).prompts[0].tokens
    assert len(scores) > 2 and all(token.logprob < 0 for token in scores[1:])
    print("ok score")

    refused(grpc.StatusCode.INVALID_ARGUMENT, "4096", lambda: list(
        api.Generate(pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[0, 5000])), max_tokens=1))))
    refused(grpc.StatusCode.INVALID_ARGUMENT, "prompt", lambda: list(api.Generate(pb.GenerateRequest(max_tokens=1))))
    refused(grpc.StatusCode.NOT_FOUND, "other", lambda: list(api.Generate(pb.GenerateRequest(model="other", prompt=chat))))
    print("ok errors")

    cluster = api.GetCluster(pb.GetClusterRequest())
    roles = {member.role for member in cluster.members}
    assert {"attention", "expert"} <= roles and len(cluster.cells) == 8, cluster
    print("ok cluster")

    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "conclave.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, (service, answer)
    print("ok health")

    names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"conclave.v1.Inference", "grpc.health.v1.Health"} <= set(names), names
    print("ok reflection")


if __name__ == "__main__":
    main()
