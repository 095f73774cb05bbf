package pgserver

import (
	"fmt"
	"os"
	"os/exec"
)

// watchdog is a shell that outlives this process. It reads the postmaster's process ID, 0 while
// there is none, from a pipe whose other end only this process has. The end of the pipe means that
// this process has ended, in whatever way. Then the shell stops the server, which cleans up its
// shared memory itself, and removes the folder, unless Close already has.
//
// A parent-death signal would do less: it exists on Linux only, is tied to a thread, and leaves the
// folder.
type watchdog struct {
	cmd  *exec.Cmd
	pipe *os.File
}

// The server may be frozen, so the script sends CONT. A postmaster that no process waits for
// remains visible as a zombie, so the wait is bounded.
const watchdogScript = `
trap '' HUP INT QUIT TERM
pid=0
while read -r line; do pid=$line; done
if [ "$pid" -gt 0 ]; then
	kill -QUIT "$pid" && kill -CONT "$pid"
	i=0
	while kill -0 "$pid" && [ -e "$1/data/postmaster.pid" ] && [ $i -lt 100 ]; do
		sleep 0.1
		i=$((i + 1))
	done
	kill -KILL "$pid"
fi
rm -rf "$1"
`

func watch(dir string) (*watchdog, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// Standard output stays unconnected, because a process that waits for the end of this process's
	// output, such as go test, must not wait for this shell.
	cmd := exec.Command("/bin/sh", "-c", watchdogScript, "pgserver-watchdog", dir)
	cmd.Dir = "/"
	cmd.Stdin = r
	detach(cmd)
	err = cmd.Start()
	_ = r.Close()
	if err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("pgserver: watchdog: %w", err)
	}
	return &watchdog{cmd: cmd, pipe: w}, nil
}

func (w *watchdog) running(pid int) {
	// If the shell has been ended from outside, the server is only less protected.
	_, _ = fmt.Fprintln(w.pipe, pid)
}

func (w *watchdog) dismiss() error {
	_ = w.pipe.Close()
	_ = w.cmd.Wait()
	return nil
}
