package oracle

import "golang.org/x/sys/unix"

// Now reads the machine's monotonic clock. It is the same for every process, and does not depend on
// the wall clock.
func Now() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		// Every Unix has this clock.
		panic(err)
	}
	return t.Nano()
}
