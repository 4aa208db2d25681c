"""A gateway among others: readiness, topology, TLS, draining, and as a process."""

import asyncio
import logging
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from anabranch.v1 import inference_pb2, inference_pb2_grpc, kv_pb2, kv_pb2_grpc, types_pb2
from cluster import errors, rpc
from cluster.config import SecurityConfig, TlsConfig
from tests.certificates import authority
from tests.fake_dense import FakeDense
from tests.gateways import (
    Fleet,
    asynchronous,
    completion,
    eventually,
    exhaust,
    expected_letters,
    fleet,
    generate,
)
from workers.gateway.gateway import Gateway

SERVICE = "anabranch.v1.InferenceService"
_SERVING = health_pb2.HealthCheckResponse.SERVING


async def _status(gateway: Gateway, service: str) -> int:
    """What grpc.health.v1 says of a service."""
    async with rpc.aio_channel(f"127.0.0.1:{gateway.port}", TlsConfig()) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


@asynchronous
async def test_health_tells_alive_from_ready(tmp_path: Path) -> None:
    """ "" is alive from the start; the service name is ready while a dense worker is usable."""
    worker = FakeDense("dense-0")
    async with fleet(tmp_path) as cluster:
        gateway = cluster.gateways[0]
        assert await _status(gateway, "") == _SERVING
        assert await _status(gateway, SERVICE) != _SERVING
        await cluster.add_dense(worker)
        await eventually(lambda: gateway.ready, "a dense worker is usable")
        assert await _status(gateway, SERVICE) == _SERVING
        await cluster.lose_dense(worker)
        await eventually(lambda: not gateway.ready, "it is gone")
        assert await _status(gateway, SERVICE) != _SERVING
        assert await _status(gateway, "") == _SERVING


@asynchronous
async def test_reflection_names_the_services(tmp_path: Path) -> None:
    """A client without our protos finds out what is served."""
    async with fleet(tmp_path) as cluster:
        address = f"127.0.0.1:{cluster.gateways[0].port}"
        async with rpc.aio_channel(address, TlsConfig()) as channel:
            ask = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in ask(iter([question]), timeout=10)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


@asynchronous
async def test_a_draining_gateway_finishes_and_refuses(tmp_path: Path) -> None:
    """Open streams end with all their tokens, new requests get UNAVAILABLE, readiness is gone."""
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster:
        gateway, stub = cluster.gateways[0], cluster.stub()
        stream = asyncio.create_task(generate(stub, completion()))
        await eventually(lambda: bool(worker.submissions), "submitted")
        draining = asyncio.create_task(gateway.drain(20.0))
        await eventually(lambda: gateway.desk.draining, "it drains")
        with pytest.raises(errors.Unavailable, match="drains"):
            await generate(stub, completion())
        assert await _status(gateway, SERVICE) != _SERVING
        assert not draining.done()
        worker.pause_at = None
        assert (await stream).tokens() == expected_letters()
        await draining


@asynchronous
async def test_what_does_not_finish_in_time_can_be_resumed_elsewhere(tmp_path: Path) -> None:
    """After the grace the client gets UNAVAILABLE and the sequence is left, not aborted: another gateway
    resumes it.
    """
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker], gateways=2) as cluster:
        call = cluster.stub().Generate(completion(request_id="kept"), timeout=20)
        stream = asyncio.create_task(exhaust(call))
        await eventually(lambda: bool(worker.submissions), "submitted")
        await cluster.gateways[0].drain(0.0)
        with pytest.raises(errors.Unavailable, match="resume"):
            await stream
        assert worker.aborts == []
        worker.pause_at = None
        resume = inference_pb2.Resume(generation=2, received=[inference_pb2.TokenPrompt()], seed=3)
        second = cluster.stub(cluster.gateways[1])
        heard = await generate(second, completion(request_id="kept", resume=resume))
    assert heard.tokens() == expected_letters()


class _Holder(kv_pb2_grpc.KvServiceServicer):
    """An attention worker that holds 40 tokens of whatever it is asked for."""

    def __init__(self) -> None:
        self.asked: list[types_pb2.SequenceKey] = []

    def Locate(self, request: kv_pb2.LocateRequest, context: grpc.ServicerContext) -> kv_pb2.LocateResponse:
        """See kv.proto."""
        self.asked.append(request.sequence)
        shard = types_pb2.ShardRef(worker_id="attention-0", epoch=7, shard_id=1, end_position=64)
        return kv_pb2.LocateResponse(shards=[kv_pb2.HeldShard(shard=shard, committed_tokens=40, blocks=2)])


@asynchronous
async def test_an_old_connection_is_left_and_its_stream_is_not_cut(tmp_path: Path) -> None:
    """A gateway tells a client to connect anew while a stream is open: what is asked next comes over a new
    connection, and the stream goes on over the old one to its end.
    """
    worker = FakeDense("dense-0", pause_at=10)
    async with fleet(tmp_path, [worker], gateway={"connection_age_ms": 1000}) as cluster:
        channel = rpc.aio_channel(f"127.0.0.1:{cluster.gateways[0].port}", TlsConfig())
        cluster.channels.append(channel)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        reading = asyncio.create_task(exhaust(stub.Generate(completion(), timeout=60)))
        await eventually(lambda: worker.paused == 1, "the stream is held")
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
        assert not reading.done()
        worker.pause_at = None
        assert (await reading).tokens() == expected_letters()


def _attention(port: int, name: str) -> inference_pb2.Member:
    account = inference_pb2.BlockAccount(capacity=10, free=6, sealed_cached=2, block_bytes=1000)
    return inference_pb2.Member(
        worker_id=name,
        role=inference_pb2.ROLE_ATTENTION,
        epoch=7,
        address=f"127.0.0.1:{port}",
        load=inference_pb2.Load(blocks=account),
    )


@asynchronous
async def test_topology_shows_members_and_where_a_request_lies(tmp_path: Path) -> None:
    """Members as known; for a live request what each attention worker says, one that is away left out."""
    holder, worker = _Holder(), FakeDense("dense-0", pause_at=3)
    server = rpc.server(threads=2)
    kv_pb2_grpc.add_KvServiceServicer_to_server(holder, server)
    port = rpc.bind(server, "127.0.0.1", 0, SecurityConfig())
    server.start()
    try:
        async with fleet(tmp_path, [worker]) as cluster:
            cluster.others = [_attention(port, "attention-0"), _attention(1, "attention-1")]
            cluster.tell()
            await _check_topology(cluster, worker)
    finally:
        server.stop(None).wait(10)
    assert holder.asked == [types_pb2.SequenceKey(request_id="seen")]


async def _check_topology(cluster: Fleet, worker: FakeDense) -> None:
    stub = cluster.stub()
    call = stub.Generate(completion(request_id="seen"), timeout=20)
    await eventually(lambda: bool(worker.submissions), "submitted")
    plain = await stub.GetTopology(inference_pb2.GetTopologyRequest())
    assert [member.worker_id for member in plain.members] == ["dense-0", "attention-0", "attention-1"]
    assert not plain.shards
    answer = await stub.GetTopology(inference_pb2.GetTopologyRequest(request_id="seen"))
    (usage,) = answer.shards
    assert usage.sequence.request_id == "seen"
    assert (usage.shard.worker_id, usage.shard.end_position) == ("attention-0", 64)
    assert (usage.committed_tokens, usage.blocks, usage.bytes) == (40, 2, 2000)
    with pytest.raises(grpc.RpcError) as caught:
        await stub.GetTopology(inference_pb2.GetTopologyRequest(request_id="unseen"))
    assert type(rpc.from_rpc(caught.value)) is errors.NotFound
    call.cancel()


@pytest.mark.parametrize("mutual", [False, True])
@asynchronous
async def test_everything_over_tls(tmp_path: Path, mutual: bool) -> None:
    """With certificates configured the gateway speaks TLS to clients; with mutual TLS those without a
    certificate are not served.
    """
    signer = authority(tmp_path)
    server, client = signer.tls("server", mutual=mutual), signer.tls("client")
    async with fleet(tmp_path, security={"tls": server.model_dump()}) as cluster:
        address = f"localhost:{cluster.gateways[0].port}"
        async with rpc.aio_channel(address, client) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            assert (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)).models
        stranger = TlsConfig(authority=client.authority) if mutual else TlsConfig()
        async with rpc.aio_channel(address, stranger) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)


@asynchronous
async def test_metrics_count_what_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Finished, failed and resubmitted requests, tokens and latencies show in the registry; the log's line
    about a request's end names the dense worker it ended at.
    """
    caplog.set_level(logging.INFO, "anabranch")
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster:
        stub, registry = cluster.stub(), cluster.gateways[0].metrics.registry
        cluster.others = [_attention(1, "attention-0")]
        cluster.tell()
        stream = asyncio.create_task(generate(stub, completion()))
        await eventually(lambda: bool(worker.submissions), "submitted")
        await worker.hand_over()
        worker.pause_at = None
        await cluster.add_dense(FakeDense("dense-1"))
        await stream

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"model_name": "tiny"} | labels)

        assert value("vllm:request_success_total", finished_reason="length") == 1
        assert value("vllm:generation_tokens_total") == 20
        assert value("vllm:prompt_tokens_total") == 5
        assert value("vllm:time_to_first_token_seconds_count") == 1
        assert value("vllm:inter_token_latency_seconds_count") == 19
        assert value("vllm:request_queue_time_seconds_sum") == 0.25
        assert value("anabranch:resubmissions_total", cause="handoff") == 1
        assert value("vllm:kv_cache_usage_perc") == pytest.approx(0.2)
        assert value("vllm:num_requests_running") == 0
        assert value("anabranch:streams_open") == 0
        assert value("vllm:prefix_cache_queries_total") == 5
        assert value("vllm:prefix_cache_hits_total") == 0
        cache = {"block_size": "32", "cache_dtype": "float32", "enable_prefix_caching": "True"}
        assert value("vllm:cache_config_info", num_gpu_blocks="10", **cache) == 1
    (ended,) = [record for record in caplog.records if record.getMessage() == "request_ended"]
    assert getattr(ended, "fields", {})["dense"] == ["dense-1"]


@asynchronous
async def test_a_gateway_tells_what_its_tokens_cost(tmp_path: Path) -> None:
    """Where the configuration names devices: dollars grow with time, and fall on the tokens counted."""
    cost = {"dense": "h100", "attention": "h20"}
    async with fleet(tmp_path, [FakeDense("dense-0")], telemetry={"cost": cost}) as cluster:
        await generate(cluster.stub(), completion())
        registry = cluster.gateways[0].metrics.registry
        label = {"model_name": "tiny"}
        paid = label | {"role": "dense"}

        def tokens(name: str) -> float:
            return registry.get_sample_value(f"vllm:{name}_tokens_total", label) or 0.0

        before_usd = registry.get_sample_value("anabranch:allocated_usd_total", paid)
        per_mtok = registry.get_sample_value("anabranch:usd_per_mtok", label | {"basis": "allocation"})
        after_usd = registry.get_sample_value("anabranch:allocated_usd_total", paid)
        assert before_usd is not None
        assert per_mtok is not None
        assert after_usd is not None
        spent = per_mtok * (tokens("prompt") + tokens("generation")) / 1e6
        assert 0 < before_usd <= spent <= after_usd


@asynchronous
async def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    """What is refused before it becomes a stream counts as well as what fails later, each once."""
    worker = FakeDense("dense-0", refusal=errors.ResourceExhausted("queue full"))
    async with fleet(tmp_path, [worker]) as cluster:
        stub, registry = cluster.stub(), cluster.gateways[0].metrics.registry
        for request, refused in (
            (completion(""), errors.InvalidRequest),
            (completion(model="other"), errors.NotFound),
            (completion(), errors.ResourceExhausted),
        ):
            with pytest.raises(refused):
                await generate(stub, request)
            labels = {"model_name": "tiny", "reason": refused.reason}
            assert registry.get_sample_value("anabranch:request_failure_total", labels) == 1
        async with httpx.AsyncClient(base_url=cluster.http) as client:
            assert (await client.post("/v1/completions", json={"promt": "x"})).status_code == 400
        labels = {"model_name": "tiny", "reason": errors.InvalidRequest.reason}
        assert registry.get_sample_value("anabranch:request_failure_total", labels) == 2
