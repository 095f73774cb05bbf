package locker

import "time"

// What the tests of field_test.go use of the API that holds that outlive their
// connections bring. Here is the fallback for the code of today.

// TODO: true once WithSessionTimeout is there.
const fieldSessions = false

// fieldTimeout sets the session timeout.
//
// TODO: return WithSessionTimeout(d)
func fieldTimeout(time.Duration) LockProviderOption {
	return func(*LockProviderConfig) {}
}

// fieldStats is what Stats gains.
type fieldStats struct {
	Waiting       int
	Suspended     time.Time // zero while the session is connected
	Listening     bool
	LastHeartbeat time.Time
}

// fieldStatsOf answers them; false: they are not there yet.
//
// TODO: s := p.Stats(); return fieldStats{s.Waiting, s.Suspended, s.Listening, s.LastHeartbeat}, true
func fieldStatsOf(*PostgresLockProvider) (fieldStats, bool) {
	return fieldStats{}, false
}

// fieldObserved says whether an observation is that of a session that was suspended
// or reconnected, and how many holds were kept and lost.
//
// TODO: return o.Kind == ObservedSuspended, o.Kind == ObservedReconnected, o.Kept, o.Lost
func fieldObserved(Observation) (suspended, reconnected bool, kept, lost int) {
	return false, false, 0, 0
}

// fieldTroubled says whether Stats shows that the provider cannot work.
func fieldTroubled(p *PostgresLockProvider) bool {
	s, ok := fieldStatsOf(p)
	return !p.Stats().Connected || ok && !s.Suspended.IsZero()
}
