"""Source that the tests of killed runs put in front of their own, in a process that forks."""

WAIT = """
def wait(child):
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""

# Python tells of every file that is written, renamed or removed, just before it happens.
DIE_AT = """
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

def die_at(count, folder):
    def before():
        left = [count]
        def hook(event, arguments):
            reads = event == "open" and "w" not in (arguments[1] or "")
            if event in EVENTS and not reads and str(arguments[0]).startswith(str(folder)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    return before
"""
