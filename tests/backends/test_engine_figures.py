"""What engines show of their load, as they write it."""

from __future__ import annotations

import pytest

from millicent.backends.engine_figures import Figures, read_figures

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.08e+04
"""
SGLANG = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 161.0
sglang:num_queue_reqs{model_name="m"} 2826.0
"""
TGI = """# TYPE tgi_queue_size gauge
tgi_queue_size 4
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 12
"""
LLAMA_CPP = """# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 0
"""


@pytest.mark.parametrize(
    ("server", "text", "expected"),
    [
        ("vllm", VLLM, Figures(5, 7)),
        ("sglang", SGLANG, Figures(161, 2826)),
        ("tgi", TGI, Figures(12, 4)),
        ("llama.cpp", LLAMA_CPP, Figures(1, 0)),
    ],
)
def test_the_load_is_read_in_each_engine_s_own_words(server: str, text: str, expected: Figures) -> None:
    assert read_figures(server, text) == expected


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ("vllm", SGLANG),
        ("vllm", ""),
        ("openai", VLLM),
        ("tgi", "tgi_batch_current_size e\ntgi_queue_size 1\n"),
        ("tgi", "tgi_batch_current_size 1e999\n"),
    ],
)
def test_what_isn_t_there_or_makes_no_sense_is_unknown(server: str, text: str) -> None:
    assert read_figures(server, text) is None
