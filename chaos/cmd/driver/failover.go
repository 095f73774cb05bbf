package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/preemptable/locker/chaos/fault"
	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// failover is one way to lose a server of two.
type failover struct {
	name        string
	synchronous bool
	silent      bool // the network goes silent first instead of a kill of the primary
	standby     bool // the standby goes silent, and comes back
}

var failovers = []failover{
	{"primary lost and synchronous standby promoted", true, false, false},
	{"primary silent and synchronous standby promoted", true, true, false},
	{"primary lost and asynchronous standby behind by 3 s promoted", false, false, false},
	{"primary silent and asynchronous standby behind by 3 s promoted", false, true, false},
	{"synchronous standby silent for 15 s", true, true, true},
}

// failover runs a separate world: a primary and a standby. The workers' URI names both.
func (d *driver) failover(ctx context.Context, base int64, f failover) (err error) {
	primary, err := fault.NewServer(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, primary.Close()) }()
	standby, err := primary.Standby(ctx, pgserver.StandbyOptions{Name: "second"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, standby.Close()) }()
	network := map[*pgserver.Server]*fault.Proxy{}
	for _, s := range []*pgserver.Server{primary, standby} {
		u, err := url.Parse(s.URI(""))
		if err != nil {
			return err
		}
		if network[s], err = fault.NewProxy(u.Host); err != nil {
			return err
		}
		defer network[s].Close()
	}
	// The replication passes a separate network, too.
	u, err := url.Parse(primary.URI(""))
	if err != nil {
		return err
	}
	replication, err := fault.NewProxy(u.Host)
	if err != nil {
		return err
	}
	defer replication.Close()
	source, err := url.Parse("tcp://" + replication.Address())
	if err != nil {
		return err
	}
	if err := standby.Set(ctx, "primary_conninfo", fmt.Sprintf("host=%s port=%s user=postgres application_name=second sslmode=disable", source.Hostname(), source.Port())); err != nil {
		return err
	}
	if f.synchronous {
		if err := primary.Set(ctx, "synchronous_standby_names", "second"); err != nil {
			return err
		}
	}
	sleep(ctx, 2*time.Second)

	w := &fault.World{Server: primary, Hosts: []*fault.Proxy{network[primary], network[standby]}, Base: base, Keys: d.keys}
	return d.inWorld(ctx, w, func() error {
		p := phase{Name: f.name, Runs: 1, From: oracle.Now()}
		sleep(ctx, 6*time.Second)
		if !f.synchronous {
			replication.Change(func(s *fault.Shape) { s.Silent = [2]bool{true, true} })
			sleep(ctx, 3*time.Second)
		}
		forget := oracle.ForgetCrash
		if !f.synchronous {
			forget = oracle.ForgetAsync
		}
		loss := fault.Fault{Name: f.name, Session: true, Inject: func(ctx context.Context, s fault.Scene) (func() error, error) {
			d.add(oracle.Event{At: oracle.Now(), Kind: oracle.Forget, Class: forget})
			if f.silent {
				network[primary].Change(func(s *fault.Shape) { s.Silent = [2]bool{true, true} })
			} else if err := primary.Kill(); err != nil {
				return nil, err
			}
			replication.Refuse()
			sleep(ctx, time.Second)
			err := standby.Promote(ctx)
			d.add(oracle.Event{At: oracle.Now(), Kind: oracle.Forget, Class: forget})
			if err != nil {
				return nil, err
			}
			w.Server = standby
			// An operator makes sure that the primary does not come back.
			if f.silent {
				sleep(ctx, 12*time.Second)
				return nil, primary.Kill()
			}
			return nil, nil
		}}
		if f.standby {
			loss = fault.Fault{Name: f.name, Slow: true, Hold: 15 * time.Second, Inject: func(context.Context, fault.Scene) (func() error, error) {
				undo := replication.Change(func(s *fault.Shape) { s.Silent = [2]bool{true, true} })
				return func() error { undo(); return nil }, nil
			}}
		}
		d.say("%s", f.name)
		if err := loss.Run(ctx, w, w.Workers(), d.rand); err != nil {
			return err
		}
		sleep(ctx, 18*time.Second)
		p.To = oracle.Now()
		d.Phases = append(d.Phases, p)
		return nil
	})
}
