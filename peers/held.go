package main

import (
	"fmt"
	"time"
)

// The values of max_connections of PostgreSQL. The stock value is 100, too few for peers that need
// a connection for each hold.
const (
	speedConnections = 200
	faultConnections = 1400
)

// hold measures a separate process that holds many locks.
func (b *bench) hold(stores map[storeKind]store) error {
	for _, p := range b.peers {
		if err := b.heldBy(p, stores[p.store], b.held); err != nil {
			return fmt.Errorf("%s: %w", p.Name, err)
		}
	}
	return nil
}

func (b *bench) heldBy(p *subject, s store, n int) error {
	net, err := newRelay(s.address())
	if err != nil {
		return err
	}
	defer net.close()
	// A first process creates everything that is created once, such as tables.
	spec := childSpec{Peer: p.ID, URI: s.uri(net.address), Options: options{TTL: b.ttl, Connections: n + 8}, First: 1 << 20, Count: 1}
	first, err := startChild(b.ctx, spec)
	if err != nil {
		return err
	}
	first.kill()
	time.Sleep(200 * time.Millisecond)
	before, connections := s.memory(), net.connections()
	spec.First, spec.Count = 1<<21, n
	c, err := startChild(b.ctx, spec)
	if err != nil {
		return err
	}
	after := s.memory()
	p.result.Held = &heldResult{
		Count: n, Connections: max(net.connections(), connections), ClientBytes: c.report.Bytes,
		Goroutines: c.report.Goroutines, StoreBytes: after - before,
	}
	c.kill()
	return nil
}
