//go:build nodatadog

package locker

import "github.com/pkg/errors"

// apmTracer returns an error unless the name is empty, because Datadog's tracer is not linked.
func apmTracer(service string) (Tracer, error) {
	if service == "" {
		return nil, nil
	}
	return nil, errors.Errorf("locker: APM service name %q: this program was built with the tag nodatadog, which leaves Datadog out: build it without the tag, or leave the name empty and use WithTracer", service)
}
