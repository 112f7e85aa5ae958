"""Daemons that are Python functions: what their own interpreter can import."""

import pytest
from processes import COMMAND

PROGRAM = """
    import gunicorn_passenger as passenger
    {sibling}

    def work(*arguments):
        print("works with", answer, *arguments, flush=True)
        import time
        time.sleep(1000)

    if __name__ == "__main__":
        passenger.spawn(work, args=[7])
        passenger.create_server(lambda environ, start_response: []).listen("passenger")
        passenger.serve_forever()
"""


@pytest.mark.parametrize("how", ["python", "python -m", "start"])
def test_a_function_of_a_script_imports_the_modules_beside_it(start, port, how):
    """Run from another directory: the script's own directory is in the daemon's path, as in the script's."""
    folder = start.home / "service"
    folder.mkdir()
    start.write("service/__init__.py", "")
    start.write("service/numbers_of_mine.py", "answer = 42\n")
    relative = "from .numbers_of_mine import answer"
    sibling = relative if how == "python -m" else "from numbers_of_mine import answer"
    script = start.write("service/app.py", PROGRAM.format(sibling=sibling))
    env = {"PORT": port}
    if how == "python":
        process = start.python(script, env=env)
    elif how == "python -m":
        process = start.python("-m", "service.app", env=env)
    else:
        process = start.python(COMMAND, "start", script, "-b", f"unix:{start.home}/app.sock")
    process.wait_log(r"\[work\] works with 42 7")
    process.stop()
