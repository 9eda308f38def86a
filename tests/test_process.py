"""LLM as a part of a process: its signals and its other threads."""
import signal
import subprocess
import sys
import threading

import pykvc

TALKS = """
import signal, sys, pykvc
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins with it ignored
with pykvc.LLM(sys.argv[1], n_ctx=8192, n_threads=1, kv_policy="streaming_llm", kv_budget=64) as llm:
    try:
        for piece in llm.generate("Once upon a time", max_tokens=-1, stream=True):
            print("going", flush=True)
        sys.exit("it came to an end by itself")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    assert llm.generate("Once upon a time", max_tokens=4).n_predicted == 4
"""


def test_ctrl_c_ends_an_answer_and_not_the_model(model_path, tmp_path):
    with subprocess.Popen([sys.executable, "-c", TALKS, str(model_path)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "going\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert out.endswith("interrupted\n")


def test_other_threads_go_on_while_it_evaluates(model_path):
    """The GIL is free then: a thread counts during a single llama_decode, which a prompt of one n_batch is."""
    with pykvc.LLM(model_path, n_ctx=512, n_batch=512, n_threads=1) as llm:
        ids = llm.tokenize("The sky is blue. "*80)[:500]
        n_counted, over = 0, threading.Event()

        def count():
            nonlocal n_counted
            while not over.wait(0.001):
                n_counted += 1
        thread = threading.Thread(target=count)
        switch = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # a thread that waits for the GIL gets it when it is given up, and not before
        try:
            thread.start()
            n_before = n_counted
            llm.generate(tokens=ids, max_tokens=0)
            n = n_counted - n_before
        finally:
            sys.setswitchinterval(switch)
            over.set()
            thread.join()
    assert n > 0
