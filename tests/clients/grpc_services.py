#!/usr/bin/env python3
"""Health and reflection as Google's own Python packages see them.

usage: grpc_services.py HOST:PORT    (needs grpcio-health-checking, grpcio-reflection and googleapis-common-protos)

Reflection is asked for every service; requests are then built from what it says alone, sent, and
must be answered with the right code and the field named: 100 malformed ones, then a good one.
"""

import sys

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

GATEWAY = "vllm.grpc.engine.VllmEngine"
SERVING = health_pb2.HealthCheckResponse.SERVING


def health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ["", "baton.v1.Inference", "baton.v1.Cluster", GATEWAY, "prefill", "decode"]:
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=10).status == SERVING, service
        first = next(iter(stub.Watch(request, timeout=10)))
        assert first.status == SERVING, service
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=10)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
    else:
        raise AssertionError("a service that there is not has a health")


class Reflected:
    """Calls of methods that are known by reflection only."""

    def __init__(self, channel):
        self.channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def call(self, method, request, **options):
        service, name = method.rsplit(".", 1)
        found = self.pool.FindServiceByName(service).FindMethodByName(name)
        asks = message_factory.GetMessageClass(found.input_type)
        answers = message_factory.GetMessageClass(found.output_type)
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        stub = kind(
            f"/{service}/{name}",
            request_serializer=asks.SerializeToString,
            response_deserializer=answers.FromString,
        )
        answer = stub(json_format.ParseDict(request, asks()), timeout=60, **options)
        return list(answer) if found.server_streaming else answer


def malformed():
    """(request, field): a request that is wrong in this field."""
    good = {"prompt": "Hello", "sampling": {"max_tokens": 1}}

    def sampling(**wrong):
        return {**good, "sampling": {"max_tokens": 1, **wrong}}

    for value in [-1, -0.1, 2.1, 3, 100, "NaN", "Infinity", "-Infinity", 1e30]:
        yield sampling(temperature=value), "temperature"
    for value in [0, -1, -0.5, 1.01, 1.1, 2, "NaN", "Infinity", 1e30]:
        yield sampling(top_p=value), "top_p"
    for value in [-1, -0.1, 1.1, 2, "NaN", "Infinity"]:
        yield sampling(min_p=value), "min_p"
    for value in [0, -1, -0.5, "NaN", "Infinity", "-Infinity"]:
        yield sampling(repetition_penalty=value), "repetition_penalty"
    for field in ["presence_penalty", "frequency_penalty"]:
        for value in [-2.1, 2.1, 100, -100, "NaN", "Infinity", "-Infinity"]:
            yield sampling(**{field: value}), field
    for value in [21, 22, 100, 65536, 4294967295]:
        yield sampling(logprobs=value), "logprobs"
        yield sampling(prompt_logprobs=value), "prompt_logprobs"
    yield sampling(max_tokens=0), "max_tokens"
    for value in [2, 100, 4294967295]:
        yield sampling(min_tokens=value), "min_tokens"
    for value in [100.1, 101, -101, "NaN", "Infinity", 1e30]:
        yield sampling(logit_bias={"1": value}), "logit_bias"
    for token in [4294967295, 1000000000]:
        yield sampling(logit_bias={str(token): 1}), "logit_bias"
        yield sampling(stop_token_ids=[token]), "stop_token_ids"
        yield {"token_ids": {"ids": [1, token]}}, "token_ids"
    yield sampling(stop_token_ids=[1] * 65), "stop_token_ids"
    yield sampling(logit_bias={str(token): 1 for token in range(1025)}), "logit_bias"
    yield sampling(stop=["x"] * 17), "stop"
    yield sampling(stop=[""]), "stop"
    yield sampling(stop=["x" * 257]), "stop"
    for value in [0, 17, 18, 64, 100, 4294967295]:
        yield {**good, "n": value}, "n"
    yield {**good, "deadline_ms": 0}, "deadline_ms"
    for value in ["high", "INTERACTIVE", "batch ", " ", "0", "x" * 1000]:
        yield {**good, "priority": value}, "priority"
    yield {**good, "tenant": "x" * 257}, "tenant"
    yield {**good, "cache_salt": "x" * 257}, "cache_salt"
    yield {}, "prompt"
    yield {"prompt": ""}, "prompt"
    yield {"token_ids": {"ids": []}}, "token_ids"
    yield {"chat": {}}, "messages"
    yield {"prompt": "word " * 100000}, "prompt"
    for model in ["gpt", " ", "x" * 10000, "demo/../x", "Demo", "demo ", "\u0000"]:
        yield {**good, "model": model}, "model"


def violations(error):
    """Fields that the error's google.rpc.BadRequest or ResourceInfo name."""
    from google.rpc import error_details_pb2, status_pb2

    status = status_pb2.Status()
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    fields = []
    for detail in status.details:
        bad, resource = error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
        if detail.Unpack(resource):
            fields.append(resource.resource_type)
    return fields


def refuses(reflected):
    wrong = list(malformed())
    assert len(wrong) >= 100, len(wrong)
    for request, field in wrong:
        shown = str(request)[:200]
        try:
            reflected.call("baton.v1.Inference.Generate", request)
        except grpc.RpcError as error:
            expected = {grpc.StatusCode.INVALID_ARGUMENT}
            if field == "model":
                expected = {grpc.StatusCode.NOT_FOUND}
            assert error.code() in expected, f"{shown}: {error}"
            named = violations(error)
            assert any(name.endswith(field) for name in named), f"{shown}: {named} and not {field}"
        else:
            raise AssertionError(f"{shown} was served")
    return len(wrong)


def main():
    (target,) = sys.argv[1:]
    with grpc.insecure_channel(target) as channel:
        health(channel)
        reflected = Reflected(channel)
        services = reflected.database.get_services()
        for service in ["baton.v1.Inference", "baton.v1.Cluster", GATEWAY, "grpc.health.v1.Health"]:
            assert service in services, services
        count = refuses(reflected)
        answer = reflected.call(
            "baton.v1.Inference.Generate", {"prompt": "Hello", "sampling": {"max_tokens": 4}}
        )
        assert answer[-1].HasField("finished"), answer
        tokens = reflected.call("baton.v1.Inference.Tokenize", {"prompt": "Hello"}).token_ids
        text = reflected.call("baton.v1.Inference.Detokenize", {"token_ids": list(tokens)}).text
        assert "Hello" in text, text
        nodes = reflected.call("baton.v1.Cluster.ListNodes", {}).nodes
        assert nodes, "no nodes"
    print(f"ok: {len(services)} services, {count} malformed requests refused by field, one served")


if __name__ == "__main__":
    main()
