"""An asyncio loop in a greenlet, in a process that gevent has patched."""

import subprocess
import sys
import textwrap

#: What each program begins with.
HEAD = """
import faulthandler; faulthandler.dump_traceback_later(50, exit=True)
from gevent import monkey; monkey.patch_all()
import asyncio, concurrent.futures, os, queue, sys, threading, time
import gevent
from gunicorn_passenger.serving.gevent_asyncio import new_event_loop

def start(main):
    def run():
        loop, selector = new_event_loop()
        selectors.append(selector)
        results.append(loop.run_until_complete(main()))
        loop.close()
    results, selectors = [], []
    thread = threading.Thread(target=run)
    thread.start()
    def end():
        thread.join()
        return results[0]
    return end, selectors
"""


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_each_greenlet_has_a_running_loop_of_its_own():
    """As each thread has: in a call that a loop has given to a thread, and in any other greenlet, while a
    handler waits in a call that gevent has patched, and while the loop itself waits.
    """
    program = """
        import greenlet
        traced = []
        greenlet.settrace(lambda event, greenlets: traced.append(event))
        pool = concurrent.futures.ThreadPoolExecutor(4)

        async def numbers(number):
            for _ in range(3):
                await asyncio.sleep(0.001)
                yield number

        async def count(number):
            time.sleep(0.001)
            assert asyncio.get_running_loop() is asyncio.current_task().get_loop()
            return sum([n async for n in numbers(number)])

        def in_a_thread(number):
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return asyncio.run(count(number))
            raise AssertionError("a thread without a loop has one")

        async def main():
            loop = asyncio.get_running_loop()
            calls = [asyncio.to_thread(in_a_thread, n) for n in range(5)]
            calls += [loop.run_in_executor(pool, in_a_thread, n) for n in range(5)]
            calls += [count(n) for n in range(5)]
            sums = await asyncio.gather(*calls)
            assert asyncio.get_running_loop() is loop
            return sums

        first, _ = start(main)
        second, _ = start(main)
        assert in_a_thread(7) == 21
        for end in (first, second):
            assert end() == [0, 3, 6, 9, 12] * 3
        assert sys.get_asyncgen_hooks() == (None, None)
        assert traced
        print("ended")
        """
    assert run(program) == ["ended"]


def test_a_trace_function_that_calls_ours_is_called_by_ours():
    """As gevent's tracers call the one before them: a second loop sets ours again after such a one."""
    program = """
        import greenlet
        from gevent._tracer import GreenletTracer

        async def main():
            loop = asyncio.get_running_loop()
            for _ in range(20):
                await asyncio.sleep(0.001)
                time.sleep(0.001)
                assert asyncio.get_running_loop() is loop
            return "ended"

        seen = []
        greenlet.settrace(lambda event, greenlets: seen.append(event))
        first, _ = start(main)
        time.sleep(0)
        tracer = GreenletTracer()
        second, _ = start(main)
        time.sleep(0.01)
        counts = len(seen), tracer.greenlet_switch_counter
        print(first(), second())
        assert len(seen) > counts[0] and tracer.greenlet_switch_counter > counts[1]
        """
    assert run(program) == ["ended", "ended"]


def test_a_trace_function_that_does_not_call_ours_is_called_by_ours_until_it_is_removed():
    """A debugger may set one at any time, and again, and may put back the one that it has found, or none."""
    program = """
        import greenlet

        def alone():
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return True

        async def switch():
            await asyncio.sleep(0.001)
            loop = asyncio.get_running_loop()
            other = gevent.spawn(alone)
            time.sleep(0.001)
            assert other.get()
            assert asyncio.get_running_loop() is loop
            return len(seen)

        async def main():
            for end in (greenlet.gettrace(), None):
                for _ in range(2):
                    greenlet.settrace(lambda event, greenlets: seen.append(event))
                    before = len(seen)
                    assert await switch() > before
                greenlet.settrace(end)
                before = len(seen)
                assert await switch() == before
            return "ended"

        seen = []
        end, _ = start(main)
        print(end())
        """
    assert run(program) == ["ended"]


def test_locks_queues_and_futures_between_a_loop_its_threads_and_greenlets():
    program = """
        lock, items, ready, count = threading.RLock(), queue.Queue(5), threading.Event(), 0

        def work(steps):
            global count
            ready.wait()
            for step in range(steps):
                with lock:
                    before = count
                    time.sleep(0.0001)
                    count = before + 1
                items.put(step)

        async def add(loop):
            await asyncio.sleep(0)
            return "coroutine"

        def call_back(loop):
            return asyncio.run_coroutine_threadsafe(add(loop), loop).result(timeout=30)

        async def main():
            ready.wait()
            await asyncio.gather(*(asyncio.to_thread(work, 50) for _ in range(3)))
            return await asyncio.to_thread(call_back, asyncio.get_running_loop())

        greenlets = [gevent.spawn(work, 50) for _ in range(3)]
        taker = gevent.spawn(lambda: [items.get() for _ in range(300)])
        end, _ = start(main)
        gevent.spawn_later(0.01, ready.set)
        print(end(), len(taker.get()), count)
        """
    assert run(program) == ["coroutine", "300", "300"]


def test_a_loop_that_is_busy_or_in_a_patched_call_leaves_the_hub_to_others():
    program = """
        ticks = []

        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0)

        async def main():
            while len(ticks) < 20:
                time.sleep(0)
            seen = len(ticks)
            while len(ticks) < seen + 20:
                await asyncio.sleep(0)
            return "ended"

        gevent.spawn(tick)
        print(start(main)[0]())
        """
    assert run(program) == ["ended"]


def test_a_child_process_of_a_coroutine():
    program = """
        async def main():
            piped = asyncio.subprocess.PIPE
            child = await asyncio.create_subprocess_exec("cat", stdin=piped, stdout=piped)
            output, _ = await child.communicate(b"piped")
            return output.decode(), child.returncode

        print(*start(main)[0]())
        """
    assert run(program) == ["piped", "0"]


def test_a_forked_child_leaves_the_loop_to_its_parent():
    """The child's hub runs, and has a copy of the loop's greenlet, with the parent's descriptors."""
    program = """
        handled = []

        async def main():
            loop, called = asyncio.get_running_loop(), asyncio.Event()
            begun.append((loop, called))
            for _ in range(3):
                await called.wait()
                called.clear()
                handled.append(os.getpid())
            return "ended"

        begun = []
        end, (selector,) = start(main)
        while not begun:
            gevent.sleep(0)
        loop, called = begun[0]
        os.register_at_fork(after_in_child=selector.leave_to_parent)
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writer, b"x")
            gevent.sleep(0.05)
            os._exit(len(handled))
        os.read(reader, 1)
        for number in range(1, 4):
            loop.call_soon_threadsafe(called.set)
            while len(handled) < number:
                gevent.sleep(0.001)
        assert os.waitpid(pid, 0)[1] == 0
        print(end())
        """
    assert run(program) == ["ended"]
