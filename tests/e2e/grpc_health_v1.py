"""grpc.health.v1 by hand: (check, watch, list) over a channel."""
import importlib.util

import harness

# The stub's package has the name of grpcio's own: it is loaded from its file.
_spec = importlib.util.spec_from_file_location(
    "health_pb2", f"{harness.STUBS}/grpc/health/v1/health_pb2.py")
h = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(h)


def _name(response):
    return h.HealthCheckResponse.ServingStatus.Name(response.status)


def health(channel):
    path = "/grpc.health.v1.Health/"

    def check(service):
        return _name(channel.unary_unary(path + "Check", h.HealthCheckRequest.SerializeToString,
                                         h.HealthCheckResponse.FromString)(
            h.HealthCheckRequest(service=service), timeout=10))

    def watch(service):
        call = channel.unary_stream(path + "Watch", h.HealthCheckRequest.SerializeToString,
                                    h.HealthCheckResponse.FromString)
        return map(_name, call(h.HealthCheckRequest(service=service), timeout=60))

    def listing():
        answer = channel.unary_unary(path + "List", h.HealthListRequest.SerializeToString,
                                     h.HealthListResponse.FromString)(
            h.HealthListRequest(), timeout=10)
        return dict(answer.statuses)
    return check, watch, listing
