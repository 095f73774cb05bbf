package oracle

import "golang.org/x/sys/unix"

// Now reads the machine's monotonic clock: it is the same for every process, and
// does not care what the wall clock says.
func Now() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // every Unix has it
	}
	return t.Nano()
}
